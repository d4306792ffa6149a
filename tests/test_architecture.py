"""The project's rules, checked by reading every file: imports, lengths, the walks of the docs, and words to avoid."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from pipeline.config.load import CONFIG_FOLDER, load_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("datasets", "pipeline", "benchmarks", "jobs")
MAX_LINES = 600
MAX_FILES = 112
"""The largest number of Python files in `datasets` and `pipeline` together."""
MAX_BYTES = 1024**2
WALK_LENGTHS = {"one image": 8, "one search trial": 8, "one HTTP request": 4}
"""The largest number of files in each walk of docs/architecture.md."""
LOADED_BY_PATH = {"pipeline.serving.pyfunc": "pipeline.serving.runtime"}
"""Maps a module to the package that it loads from the registered model's folder instead of importing it."""
COMMAND = re.compile(r"python -m ((?:jobs|benchmarks|tests)(?:\.[a-z_]+)+)([^`|&#\n]*)")
OWN_CONFIG = "mine"
"""The name that the docs use for a reader's own configuration."""
IMPORTS_HEADER = "| library | imported by |"
PROSE_SUFFIXES = (".py", ".md", ".yaml", ".j2", ".sh", ".toml")
MAX_DOCSTRING_LINES = 3
DYNAMIC_IMPORTS = ("import_module", "__import__")

# Imports go datasets <- pipeline <- benchmarks <- jobs, never back.
TURNED = {
    "datasets": {"pipeline", "benchmarks", "jobs"},
    "pipeline": {"benchmarks", "jobs"},
    "benchmarks": {"jobs"},
    "jobs": set(),
}
# Folders, and single modules, that may import a library.
ONLY_IN = {
    "ray": {
        "pipeline/cluster",
        "pipeline/search/checks",
        "pipeline/search/driver",
        "pipeline/search/tuner",
        "pipeline/serving/deployments",
        "benchmarks/nodes",
        "benchmarks/recovery",
    },
    "mlflow": {
        "pipeline/tracking",
        "pipeline/serving/deployments",
        "pipeline/serving/package",
        "pipeline/serving/pyfunc",
        "benchmarks/serve",
    },
    # The loader reads FFCV's format with FFCV's compiled library. Its Python code runs in benchmarks and tests alone.
    "ffcv": {"benchmarks/loader", "benchmarks/prepare"},
}
# These run without a cluster and wherever torch does, so what they load must not load one of these either.
LOADS_NONE_OF = {
    "pipeline/models": {"ray", "mlflow", "ffcv"},
    "pipeline/training": {"ray", "mlflow", "ffcv"},
    "pipeline/evaluation": {"ray", "mlflow", "ffcv"},
    "pipeline/serving/export": {"ray", "mlflow", "ffcv"},
    "pipeline/serving/runtime": {"ray", "mlflow", "ffcv"},
    "pipeline/search/trial": {"ray", "ffcv"},
}

JOBS = sorted(
    file.stem
    for file in (ROOT / "jobs").glob("*.py")
    if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(file.read_text()).body)
)
CONFIGS = sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml"))


def source_files(root: Path) -> dict[str, Path]:
    """Return every module of the packages under `root`, by its dotted name."""
    files = {}
    for file in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the names of the modules that a syntax tree imports, anywhere in it; of `from a import b` both a and a.b.

    `package` is the one that relative imports start from.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (name for alias in node.names for name in _with_parents(alias.name))
            case ast.ImportFrom():
                parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*parents, *([node.module] if node.module else [])])
                yield from _with_parents(base)
                yield from (f"{base}.{alias.name}" for alias in node.names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if _name_of(node) in DYNAMIC_IMPORTS:
                yield from _with_parents(name)


def _with_parents(module: str) -> list[str]:
    """Return a.b.c and the modules that Python runs before it: a, a.b."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def top_level(tree: ast.Module) -> ast.Module:
    """Return the statements that run when a module is imported: no function bodies, nothing for type checkers only."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            return node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return ast.fix_missing_locations(Strip().visit(ast.parse(ast.unparse(tree))))


def import_violations(root: Path) -> list[str]:
    """Return every forbidden import under `root`, one sentence each."""
    files = source_files(root)
    trees = {module: ast.parse(file.read_text()) for module, file in files.items()}
    packages = {
        module: module if files[module].name == "__init__.py" else module.rpartition(".")[0] for module in files
    }
    violations = []
    for module, tree in trees.items():
        outside = {name.split(".")[0] for name in imported(tree, packages[module])}
        forbidden = TURNED[module.split(".")[0]] | {
            name for name, places in ONLY_IN.items() if not any(_is_in(module, place) for place in places)
        }
        violations += [f"{files[module].relative_to(root)} imports {name}" for name in sorted(outside & forbidden)]
    at_import = {module: set(imported(top_level(tree), packages[module])) for module, tree in trees.items()}
    for place, forbidden in LOADS_NONE_OF.items():
        for module in (module for module in trees if _is_in(module, place)):
            violations += [
                f"{module} loads {chain[-1]} by way of {' -> '.join(chain[1:-1])}"
                for chain in _chains(module, at_import)
                if chain[-1] in forbidden and len(chain) > 2
            ]
    return violations


def _is_in(module: str, place: str) -> bool:
    return f"{module}.".startswith(f"{place.replace('/', '.')}.")


def _chains(module: str, at_import: dict[str, set[str]]) -> Iterator[list[str]]:
    """Return the shortest chain of imports from a module to each module that it loads, the project's and others'."""
    seen, waiting = {module}, [[module]]
    while waiting:
        chain = waiting.pop(0)
        for name in sorted(at_import.get(chain[-1], set())):
            if name not in seen:
                seen.add(name)
                yield [*chain, name]
                waiting.append([*chain, name])


@cache
def import_graph(root: Path) -> dict[str, set[str]]:
    """Return, for every module under `root`, the project's modules that it imports, anywhere in it."""
    files = source_files(root)
    graph = {}
    for module, file in files.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        named = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named |= set(imported(node, package))
        # `from package import module` also runs the package; only the named modules count.
        graph[module] = {name for name in named & files.keys() if files[name].name != "__init__.py"} - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other, each sorted."""
    reached = {node: _reached_from(node, graph) for node in graph}
    groups = {tuple(sorted({node} | {other for other in reached[node] if node in reached[other]})) for node in graph}
    return sorted(list(group) for group in groups if len(group) > 1)


def _reached_from(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        for name in graph.get(waiting.pop(), set()) - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def folder_graph(root: Path) -> dict[str, set[str]]:
    """Return, for every folder of the project, the other folders from which its modules import."""
    graph: dict[str, set[str]] = {}
    for module, names in import_graph(root).items():
        folder = module.rpartition(".")[0]
        graph.setdefault(folder, set()).update(name.rpartition(".")[0] for name in names)
    return {folder: others - {folder} for folder, others in graph.items()}


def walks(page: str) -> dict[str, list[str]]:
    """Return the numbered files of each section `## Walk: ...` of a page, by its title up to the first comma."""
    sections = [section.partition("\n") for section in re.split(r"^## ", page, flags=re.MULTILINE)]
    return {
        title.removeprefix("Walk: ").partition(",")[0]: re.findall(r"^\d+\. `([^`]+)`", text, flags=re.MULTILINE)
        for title, _, text in sections
        if title.startswith("Walk: ")
    }


def walk_problems(files: Sequence[str], graph: dict[str, set[str]]) -> list[str]:
    """Return what is wrong with a walk: files that do not exist, and files that none before them imports."""
    problems, reached = [], None
    for file in files:
        module = file.removesuffix(".py").replace("/", ".")
        if module not in graph:
            problems.append(f"{file} does not exist")
        elif reached is not None and module not in reached:
            problems.append(f"no file before {file} imports it")
        imports = graph.get(module, set()) | graph.get(LOADED_BY_PATH.get(module, ""), set())
        reached = (reached or set()) | imports
    return problems


def table_rows(page: str, header: str) -> list[list[str]]:
    """Return the cells of the Markdown table that begins with `header`, row by row."""
    body = page.partition(f"{header}\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in body.splitlines()[1:]]


def words_to_avoid() -> list[str]:
    """Return the words of the table in CONTRIBUTING.md."""
    rows = table_rows((ROOT / "CONTRIBUTING.md").read_text(), "| word | write |")
    return [word.strip() for words, _ in rows for word in words.split(",")]


def word_violations(name: str, text: str, words: Sequence[str]) -> list[str]:
    """Return `name:line: words` for each of the words in a text and in the names of its tests, even across the lines of
    a comment."""
    text = re.sub(r"\bdef test_\w+", lambda found: found[0].replace("_", " "), text)
    phrases = (r"\s+(?:#\s*)?".join(map(re.escape, word.split())) for word in words)
    pattern = re.compile(rf"\b(?:{'|'.join(phrases)})\b", re.IGNORECASE)
    return [
        f"{name}:{text.count(chr(10), 0, found.start()) + 1}: {' '.join(found[0].split())}"
        for found in pattern.finditer(text)
    ]


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def plant(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_imports_go_one_way():
    assert {"datasets.beton", "pipeline.config.schema", "jobs.train"} <= source_files(ROOT).keys()
    assert import_violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("datasets/loading/loader.py", "from pipeline import config", "datasets/loading/loader.py imports pipeline"),
        ("datasets/loading/loader.py", "def load():\n    import ray.data", "datasets/loading/loader.py imports ray"),
        ("pipeline/config/schema.py", "import jobs.cli as cli", "pipeline/config/schema.py imports jobs"),
        ("pipeline/training/describe.py", "import torch, ray", "pipeline/training/describe.py imports ray"),
        ("pipeline/cluster/driver.py", "from mlflow import MlflowClient", "pipeline/cluster/driver.py imports mlflow"),
        (
            "pipeline/evaluation/report.py",
            "from ffcv.loader import Loader",
            "pipeline/evaluation/report.py imports ffcv",
        ),
        ("jobs/register.py", "__import__('mlflow')", "jobs/register.py imports mlflow"),
        ("jobs/bench.py", "importlib.import_module('ffcv.writer')", "jobs/bench.py imports ffcv"),
        ("pipeline/tracking/store.py", "if TYPE_CHECKING:\n    import ray", "pipeline/tracking/store.py imports ray"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, path, text, expected):
    plant(tmp_path, path, text)

    assert import_violations(tmp_path) == [expected]


def test_a_forbidden_import_through_others_is_found(tmp_path):
    plant(tmp_path, "pipeline/training/loop.py", "from ..tracking import tracker")
    plant(tmp_path, "pipeline/tracking/tracker.py", "if True:\n    import mlflow.pytorch")
    plant(tmp_path, "pipeline/training/objectives.py", "def late():\n    from pipeline.tracking import tracker")

    assert import_violations(tmp_path) == ["pipeline.training.loop loads mlflow by way of pipeline.tracking.tracker"]


def test_a_package_is_loaded_with_its_modules(tmp_path):
    plant(tmp_path, "pipeline/models/__init__.py", "")
    plant(tmp_path, "pipeline/models/drnet.py", "import datasets.loading.order")
    plant(tmp_path, "datasets/__init__.py", "import ffcv")
    plant(tmp_path, "datasets/loading/order.py", "")

    assert import_violations(tmp_path) == [
        "datasets/__init__.py imports ffcv",
        "pipeline.models.drnet loads ffcv by way of datasets",
    ]


def test_allowed_imports_pass(tmp_path):
    plant(tmp_path, "datasets/loading/loader.py", "import torch\nfrom . import kernels")
    plant(
        tmp_path,
        "pipeline/cluster/driver.py",
        "import ray\nfrom ray import train\nfrom pipeline.tracking import tracker",
    )
    plant(tmp_path, "pipeline/tracking/tracker.py", "import mlflow\nfrom datasets.beton import Manifest")
    plant(
        tmp_path,
        "pipeline/training/loop.py",
        "import torch\nif TYPE_CHECKING:\n    from datasets.loading.loader import Batch",
    )
    plant(tmp_path, "jobs/train.py", "import raylike_name\nfrom pipeline.cluster import driver")
    plant(tmp_path, "benchmarks/loader.py", "import ffcv.loader")

    assert import_violations(tmp_path) == []


def test_no_import_circle():
    assert circles(import_graph(ROOT)) == []
    assert circles(folder_graph(ROOT)) == []


def test_a_circle_is_found(tmp_path):
    plant(tmp_path, "datasets/beton.py", "def late():\n    from datasets.loading import loader")
    plant(tmp_path, "datasets/loading/loader.py", "from datasets.loading.kernels import decode_boxes")
    plant(tmp_path, "datasets/loading/kernels.py", "from datasets import beton")

    files = ["datasets.beton", "datasets.loading.kernels", "datasets.loading.loader"]
    assert circles(import_graph(tmp_path)) == [files]
    assert circles(folder_graph(tmp_path)) == [["datasets", "datasets.loading"]]


def test_training_starts_few_files():
    assert len(_reached_from("jobs.train", import_graph(ROOT))) <= 71


def test_files_are_short():
    files = [*source_files(ROOT).values(), *(ROOT / "tests").rglob("*.py")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}

    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_datasets_and_pipeline_have_few_files():
    files = [file for folder in ("datasets", "pipeline") for file in (ROOT / folder).rglob("*.py")]

    assert 50 < len(files) <= MAX_FILES


def test_no_tracked_file_is_large():
    assert [str(file.relative_to(ROOT)) for file in tracked_files() if file.stat().st_size > MAX_BYTES] == []


def subject_folders() -> list[Path]:
    """Return every folder with an `__init__.py` in the project's packages."""
    return sorted(file.parent for package in PACKAGES for file in (ROOT / package).rglob("__init__.py"))


@pytest.mark.parametrize("folder", subject_folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_subject_folder_says_what_it_is_for(folder):
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))

    assert docstring, "write in at most three lines what the folder is for and where to start reading"
    assert len(docstring.splitlines()) <= MAX_DOCSTRING_LINES


def test_the_walks_of_the_docs_follow_the_imports():
    found = walks((ROOT / "docs" / "architecture.md").read_text())

    assert found.keys() == WALK_LENGTHS.keys()
    for title, files in found.items():
        assert 1 < len(files) <= WALK_LENGTHS[title], title
        assert len(set(files)) == len(files), title
        assert walk_problems(files, import_graph(ROOT)) == [], title


def test_the_package_that_is_loaded_by_path_is_stored_with_the_model():
    for module, package in LOADED_BY_PATH.items():
        assert "spec_from_file_location" in source_files(ROOT)[module].read_text()
        assert package in set(imported(ast.parse((ROOT / "pipeline/serving/package.py").read_text()), ""))


def test_a_walk_that_the_imports_do_not_follow_is_found(tmp_path):
    plant(tmp_path, "jobs/train.py", "from pipeline.training import loop")
    plant(tmp_path, "pipeline/training/loop.py", "def late():\n    import datasets.beton")
    plant(tmp_path, "datasets/beton.py", "")
    plant(tmp_path, "datasets/files.py", "from datasets import beton")
    page = (
        "# Page\n\n## Walk: one run, from a command\n\n1. `jobs/train.py`: ...\n2. `pipeline/training/loop.py`: ...\n"
    )
    graph = import_graph(tmp_path)

    assert walks(page) == {"one run": ["jobs/train.py", "pipeline/training/loop.py"]}
    assert walk_problems(["jobs/train.py", "pipeline/training/loop.py", "datasets/beton.py"], graph) == []
    assert walk_problems(["jobs/train.py", "datasets/beton.py"], graph) == [
        "no file before datasets/beton.py imports it"
    ]
    assert walk_problems(["datasets/beton.py", "datasets/files.py"], graph) == [
        "no file before datasets/files.py imports it"
    ]
    assert walk_problems(["jobs/train.py", "jobs/gone.py"], graph) == ["jobs/gone.py does not exist"]


def test_contributing_names_the_rules_of_this_file():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    table = {library: set(re.findall(r"`([^`]+)`", places)) for library, places in table_rows(page, IMPORTS_HEADER)}
    reading = page.partition("## Read the code in this order")[2].partition("\n## ")[0]
    files = re.findall(r"^\d+\. `([^`]+)`", reading, flags=re.MULTILINE)

    subjects = [folder.relative_to(ROOT) for folder in subject_folders() if folder.parent == ROOT / "pipeline"]

    assert table == ONLY_IN
    assert [str(folder) for folder in subjects if f"`{folder}`" not in page] == []
    assert len(files) == 6
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_no_word_to_avoid_is_used():
    violations = []
    for file in tracked_files():
        if file.suffix not in PROSE_SUFFIXES and file.name != "Makefile":
            continue
        text, name = file.read_text(), str(file.relative_to(ROOT))
        if name == "CONTRIBUTING.md":  # its tables list the words
            text = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)
        violations += word_violations(name, text, words_to_avoid())

    assert violations == []


def test_a_word_to_avoid_is_found():
    words = words_to_avoid()
    one, two = words[0], next(word for word in words if " " in word)
    first, second = two.split()

    assert len(words) > 15
    assert word_violations("a.py", f"x = 1  # {one.title()}\n", words) == [f"a.py:1: {one.title()}"]
    assert word_violations("a.py", f"\n# {first}\n# {second}", words) == [f"a.py:2: {first} # {second}"]
    assert word_violations("a.py", f"\ndef test_it_{first}_{second}():", words) == [f"a.py:2: {two}"]
    assert word_violations("a.py", f"a{one} {one}s {first} {first} {one}_of", words) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_config_loads(name):
    assert load_config(name).stages.present()


@pytest.mark.parametrize("name", JOBS)
def test_job_helps(name, monkeypatch, capsys):
    job = importlib.import_module(f"jobs.{name}")
    monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", "--help"])

    with pytest.raises(SystemExit) as ended:
        job.main()

    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert job.__doc__, f"jobs/{name}.py needs a docstring: it is what --help says"
    first_line = job.__doc__.strip().splitlines()[0]
    assert printed.startswith(f"usage: python -m jobs.{name}")
    assert " ".join(first_line.split()) in " ".join(printed.split())


def documented_commands() -> list[tuple[str, str, list[str]]]:
    """Return page, module and arguments of every `python -m ...` in the README, CONTRIBUTING and docs."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {page.name: page.read_text().replace("\\\n", " ") for page in pages}  # a command may have several lines
    return [(name, found[1], shlex.split(found[2])) for name, text in texts.items() for found in COMMAND.finditer(text)]


def test_documented_commands_are_accepted(monkeypatch, capsys):
    commands = documented_commands()
    helps = {}
    for name in {module.partition(".")[2] for _, module, _ in commands if module.startswith("jobs.")} - {"cli"}:
        monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(f"jobs.{name}").main()
        helps[f"jobs.{name}"] = capsys.readouterr().out

    assert len(commands) > 30
    for page, module, arguments in commands:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), f"{page}: {module} does not exist"
        if module not in helps:
            continue
        options = [argument for argument in arguments if argument.startswith("--")]
        assert [option for option in options if option not in helps[module]] == [], f"{page}: {module}"
        if "--config" in arguments and (name := arguments[arguments.index("--config") + 1]) != OWN_CONFIG:
            assert load_config(name, [argument for argument in arguments if re.match(r"[\w.]+=", argument)])
