"""The house's rules, held by reading every file: who imports whom, how long files are, what is tracked."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.load import CONFIG_FOLDER, load_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("datasets", "pipeline", "benchmarks", "jobs")
MAX_LINES = 600
MAX_BYTES = 1024**2
DYNAMIC_IMPORTS = ("import_module", "__import__")

# The arrows datasets <- pipeline <- benchmarks <- jobs never turn.
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
        "benchmarks/nodes",
        "benchmarks/recovery",
    },
    "mlflow": {
        "pipeline/tracking",
        "pipeline/serving/package",
        "pipeline/serving/predict",
        "pipeline/serving/pyfunc",
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
    """Every module of the three packages under `root`, by its dotted name."""
    files = {}
    for file in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Names of the modules that a syntax tree imports, anywhere in it; of `from a import b` both a and a.b.

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
    """a.b.c and what Python runs before it: a, a.b."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def top_level(tree: ast.Module) -> ast.Module:
    """The statements that run when a module is imported: no function bodies, nothing that is for type checkers only."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            return node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return ast.fix_missing_locations(Strip().visit(ast.parse(ast.unparse(tree))))


def import_violations(root: Path) -> list[str]:
    """Every import under `root` that the house forbids, one sentence each."""
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
    """The shortest way from a module to each module that is loaded with it, the project's and others'."""
    seen, waiting = {module}, [[module]]
    while waiting:
        chain = waiting.pop(0)
        for name in sorted(at_import.get(chain[-1], set())):
            if name not in seen:
                seen.add(name)
                yield [*chain, name]
                waiting.append([*chain, name])


def import_graph(root: Path) -> dict[str, set[str]]:
    """For every module under `root`, the project's modules that it imports, anywhere in it."""
    files = source_files(root)
    graph = {}
    for module, file in files.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        named = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named |= set(imported(node, package))
        # `from package import module` also runs the package; only the modules that are named count as arrows.
        graph[module] = {name for name in named & files.keys() if files[name].name != "__init__.py"} - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other, each sorted."""
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
    """For every folder of the project, the other folders whose modules its own modules import."""
    graph: dict[str, set[str]] = {}
    for module, names in import_graph(root).items():
        folder = module.rpartition(".")[0]
        graph.setdefault(folder, set()).update(name.rpartition(".")[0] for name in names)
    return {folder: others - {folder} for folder, others in graph.items()}


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
    plant(tmp_path, "pipeline/models/drnet.py", "import datasets.loading.decode")
    plant(tmp_path, "datasets/__init__.py", "import ffcv")
    plant(tmp_path, "datasets/loading/decode.py", "")

    assert import_violations(tmp_path) == [
        "datasets/__init__.py imports ffcv",
        "pipeline.models.drnet loads ffcv by way of datasets",
    ]


def test_allowed_imports_pass(tmp_path):
    plant(tmp_path, "datasets/loading/loader.py", "import torch\nfrom . import decode")
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
    plant(tmp_path, "datasets/loading/loader.py", "from datasets.loading.decode import Decoder")
    plant(tmp_path, "datasets/loading/decode.py", "from datasets import beton")

    assert circles(import_graph(tmp_path)) == [["datasets.beton", "datasets.loading.decode", "datasets.loading.loader"]]
    assert circles(folder_graph(tmp_path)) == [["datasets", "datasets.loading"]]


def test_training_starts_few_files():
    assert len(_reached_from("jobs.train", import_graph(ROOT))) <= 75


def test_files_are_short():
    files = [*source_files(ROOT).values(), *(ROOT / "tests").rglob("*.py")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}

    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_tracked_file_is_large():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    tracked = [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]

    assert [str(file.relative_to(ROOT)) for file in tracked if file.stat().st_size > MAX_BYTES] == []


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
