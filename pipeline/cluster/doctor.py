"""Check whether the nodes of a cluster can run a configuration. Report all problems together, each with a fix."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from datasets.beton import TRAIN, VALIDATION, Manifest, load_manifest, verify_betons
from datasets.files import shown_bytes
from datasets.parallel import available_cpus
from datasets.staging import remote_manifest
from pipeline.cluster.connection import ADDRESS, MODE, TOKEN, ray_cluster, token_file
from pipeline.cluster.preflight import capacity_problems, check_config, cluster_capacity, number_of
from pipeline.config.fields import sqlite_address
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config
from pipeline.tracking.store import sqlite_file, tracking_uri
from pipeline.training.describe import describe

NODE_TIMEOUT_SECONDS = 120.0
LIBRARIES = ("ray", "torch", "torchvision", "ffcv", "numba", "numpy", "mlflow", "pyarrow", "pydantic", "xxhash")


@dataclass(frozen=True)
class Request:
    """What a node should check.

    Attributes:
        mark: folder in the storage that contains a file of the driver; the node reads it and writes another file.
        tracking_uri: address of the tracking server; None if no server has to be checked.
        tokens: whether to check the file with Ray's token.
        thorough: whether to check what takes seconds too: the data's bytes, GPUs, the data's address, the tracking
            server.
    """

    mark: Path
    data_folder: Path
    data_uri: str | None = field(repr=False)
    tracking_uri: str | None = field(repr=False)
    tokens: bool
    thorough: bool


@dataclass(frozen=True)
class Answer:
    """What a process found on its node. Problems say what to change, but not on which node."""

    host: str
    versions: Mapping[str, str]
    cpus: int
    """The number of CPUs that processes on the node may use."""
    gpus: int | None
    """The number of GPUs that torch sees; None if not checked."""
    memory_bytes: int
    data_digest: str | None
    """The digest of the data in data.folder; None without usable data."""
    data_free_bytes: int
    storage_free_bytes: int
    problems: list[str]


@dataclass(frozen=True)
class Node:
    """A node of the cluster: what Ray reports about it, and its own answer."""

    name: str
    is_driver: bool
    cpus: int
    gpus: int
    answer: Answer


def probe_nodes(request: Request) -> tuple[list[Node], list[str]]:
    """Ask every node of the connected cluster to check itself. The driver's own node answers without a Ray task.

    Returns:
        The nodes, and a problem for each node that does not answer.
    """
    own, asked = ray.get_runtime_context().get_node_id(), []
    for node in (node for node in ray.nodes() if node["Alive"]):
        node_id, gpus = node["NodeID"], int(node["Resources"].get("GPU", 0))
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        task = _answer_remotely.options(scheduling_strategy=there)
        asked.append((node, None if node_id == own else task.remote(request, node_id, gpus)))
    nodes, problems = [], []
    for node, task in asked:
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        cpus, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        try:
            found = ray.get(task, timeout=NODE_TIMEOUT_SECONDS) if task else answer(request, node["NodeID"], gpus)
            nodes.append(Node(name, task is None, cpus, gpus, found))
        except GetTimeoutError:
            problems.append(
                f"{name} does not answer within {NODE_TIMEOUT_SECONDS:.0f} s; check whether its disks and network file "
                "systems respond (df), and whether it has memory left"
            )
        except RayError as error:
            said = str(error).strip().splitlines()[-1]
            advice = "; start the command as a Ray job (ray job submit)" if "No module named" in said else ""
            problems.append(f"{name} cannot run this project's code: {said}{advice}")
    return nodes, problems


@ray.remote(num_cpus=0, max_retries=0)
def _answer_remotely(request: Request, node_id: str, gpus: int) -> Answer:
    return answer(request, node_id, gpus)


def answer(request: Request, node_id: str, gpus: int) -> Answer:
    """Check the machine that this runs on. `gpus` is Ray's count of its GPUs."""
    problems = [*_storage_problems(request.mark, node_id), *(token_problems() if request.tokens else ())]
    digest = _data_digest(request, problems)
    if request.thorough and request.data_uri:
        try:
            remote_manifest(request.data_uri)
        except (ValueError, OSError) as error:
            problems.append(f"data.uri: {error}")
    if request.thorough and request.tracking_uri:
        from pipeline.tracking.store import server_problem  # mlflow takes seconds to import

        problems += filter(None, [server_problem(request.tracking_uri)])
    return Answer(
        host=platform.node(),
        versions={"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        cpus=available_cpus(),
        gpus=_gpus_seen() if gpus and request.thorough else None,
        memory_bytes=psutil.virtual_memory().total,
        data_digest=digest,
        data_free_bytes=free_bytes(request.data_folder),
        storage_free_bytes=free_bytes(request.mark),
        problems=problems,
    )


@contextmanager
def marked(storage: Path) -> Iterator[Path]:
    """Yield a new folder in the storage that contains a file of the driver. The folder is removed afterwards.

    Raises:
        OSError: the driver cannot write to the storage.
    """
    mark = storage / f".doctor-{secrets.token_hex(8)}"
    mark.mkdir(parents=True)
    try:
        (mark / "driver").write_text(mark.name)
        yield mark
    finally:
        shutil.rmtree(mark, ignore_errors=True)


def token_problems() -> Iterator[str]:
    """Yield a problem if other users can read the file with Ray's token."""
    path = token_file()
    if os.environ.get(TOKEN) or path is None:
        return
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:  # there is no file, or this user cannot reach it
        return
    if mode & 0o077:
        yield f"other users can read the token in {path} (mode {mode:o}) and run code on the cluster: chmod 600 {path}"


def free_bytes(path: Path) -> int:
    """Return the free space where a folder is or would be created, in bytes; 0 if that is unknown."""
    try:
        return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
    except OSError:
        return 0


def _storage_problems(mark: Path, node_id: str) -> Iterator[str]:
    try:
        if (mark / "driver").read_text() == mark.name:
            (mark / node_id).write_text(mark.name)
            yield from lock_problems(mark / node_id)
            return
        found = "it contains another file"
    except OSError as error:
        found = f"{error.strerror}: {error.filename}"
    yield (
        f"cluster.storage {mark.parent} is not the folder that the driver writes to ({found}); mount one file system "
        "there on every node, writable for the user that Ray runs as"
    )


def lock_problems(file: Path) -> Iterator[str]:
    """Yield a problem if a file in a folder of the storage cannot be locked."""
    try:
        with file.open("w") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        yield (
            f"cluster.storage {file.parent.parent} cannot be locked ({error.strerror}), but a lock keeps a second "
            "driver out of a run; mount its file system with locks (NFS: without `nolock`), or choose another folder"
        )


def _data_digest(request: Request, problems: list[str]) -> str | None:
    """Return the digest of data.folder. Add to `problems` why the data is unusable, unless data.uri will provide it."""
    try:
        read = verify_betons if request.thorough else load_manifest
        manifest: Manifest = read(request.data_folder)
    except (ValueError, OSError) as error:
        if request.data_uri is None:
            problems.append(f"data.folder: {error}")
        return None
    return manifest.digest


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _gpus_seen() -> int:
    """Count GPUs in a separate process, because Ray hides them from this process, which requested none."""
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    script = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    return int(found.stdout) if found.returncode == 0 else 0


KEPT_CHECKPOINTS = 3
"""The largest number of checkpoints on disk: two that Ray Train keeps, and one that is being written."""


@dataclass
class Diagnosis:
    """All problems and notes that were found. Problems prevent a run; notes do not."""

    nodes: list[Node] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine(config: Config) -> Diagnosis:
    """Check everything, on the cluster of RAY_ADDRESS or, if that is not set, on this machine.

    This creates cluster.storage if it is missing, and changes nothing else.
    """
    found, manifest = Diagnosis(), None
    try:
        manifest, _ = check_config(config, capacity=False)
    except ConfigError as error:
        found.problems += error.problems
    with ray_cluster():
        _look(config, manifest.digest if manifest else None, found, thorough=True)
    if not found.problems:
        found.problems += space_problems(config)
    if manifest is not None:
        found.problems += staging_problems(config, manifest, found.nodes)
        found.notes += memory_notes(config, manifest, found.nodes)
    found.notes += cluster_notes()
    found.problems = list(dict.fromkeys(found.problems))
    return found


def require_healthy(config: Config, data_digest: str) -> None:
    """Run the quick checks on the connected cluster.

    Raises:
        ConfigError: lists every problem.
    """
    found = Diagnosis()
    _look(config, data_digest, found, thorough=False)
    if found.problems:
        raise ConfigError(found.problems, "the cluster")


def _look(config: Config, data_digest: str | None, found: Diagnosis, *, thorough: bool) -> None:
    storage, uri = Path(config.cluster.storage).absolute(), tracking_uri(config)
    found.problems += capacity_problems(config, cluster_capacity())
    try:
        with marked(storage) as mark:
            request = Request(
                mark,
                config.data.folder.absolute(),
                config.data.uri,
                tracking_uri=uri,
                tokens=thorough or bool(os.environ.get(ADDRESS)),
                thorough=thorough,
            )
            found.nodes, silent = probe_nodes(request)
    except OSError as error:
        found.problems.append(
            f"the driver cannot write to cluster.storage {storage} ({error.strerror}); choose a writable folder on a "
            "file system that every node sees"
        )
        return
    found.problems += [*silent, *node_problems(config, found.nodes, data_digest)]
    found.notes += thread_notes(config, found.nodes)


def node_problems(config: Config, nodes: Sequence[Node], data_digest: str | None) -> Iterator[str]:
    """Yield the problems in the nodes' answers.

    Args:
        data_digest: digest of the driver's data; None if the driver has none.
    """
    nodes_by_problem: dict[str, list[Node]] = {}
    for node in nodes:
        for problem in node.answer.problems:
            of_data = problem.startswith("data.")
            if not of_data or (data_digest and (node.cpus or node.is_driver)):  # a head without workers needs no data
                nodes_by_problem.setdefault(problem, []).append(node)
    yield from (f"{problem} (on {listed(where, nodes)})" for problem, where in nodes_by_problem.items())
    yield from version_problems(nodes)
    if data_digest and not config.data.uri:
        yield from digest_problems(config, nodes, data_digest)
    yield from gpu_problems(nodes)
    yield from sqlite_problems(config, nodes)


def version_problems(nodes: Sequence[Node]) -> Iterator[str]:
    """Yield the libraries whose versions differ between nodes."""
    for name in dict.fromkeys(name for node in nodes for name in node.answer.versions):
        by_version: dict[str, list[Node]] = {}
        for node in nodes:
            by_version.setdefault(node.answer.versions[name], []).append(node)
        if len(by_version) > 1:
            versions = "; ".join(f"{version} on {listed(where, nodes)}" for version, where in by_version.items())
            yield f"{name} is not the same on every node: {versions}. Install requirements.lock on all (make setup)"


def digest_problems(config: Config, nodes: Sequence[Node], data_digest: str) -> Iterator[str]:
    """Yield a problem if nodes have other data than the driver."""
    others = [node for node in nodes if node.answer.data_digest not in (None, data_digest)]
    if others:
        yield (
            f"data.folder {config.data.folder} has other data than the driver's (digest {data_digest}) on "
            f"{listed(others, nodes)}; copy the same data to every node, or set data.uri so that nodes download it"
        )


def gpu_problems(nodes: Sequence[Node]) -> Iterator[str]:
    """Yield the nodes where torch sees fewer GPUs than Ray."""
    for node in nodes:
        if node.answer.gpus is not None and node.answer.gpus < node.gpus:
            yield (
                f"Ray counts {number_of(node.gpus, 'GPU')} on {node.name}, torch sees {node.answer.gpus}; compare the "
                "driver (nvidia-smi) with the CUDA of `python -c 'import torch; print(torch.version.cuda)'`, or start "
                f"Ray there with --num-gpus={node.answer.gpus}"
            )


def sqlite_problems(config: Config, nodes: Sequence[Node]) -> Iterator[str]:
    """Yield a problem if the tracking store is a file on one machine of several."""
    file, storage = sqlite_file(tracking_uri(config)), Path(config.cluster.storage).resolve()
    hosts = {node.answer.host for node in nodes}
    # The storage of a search's finetuned runs is STORAGE/NAME/search/finetuned.
    shared = {storage, storage.parents[2]} if storage.parts[-2:] == ("search", "finetuned") else {storage}
    # A file in the storage, or next to one of its parent folders, is fine.
    if file is not None and len(hosts) > 1 and not shared & {*file.parents} and file.parent not in storage.parents:
        yield (
            f"the tracking store {file} is a file of one machine, and this cluster has {len(hosts)}; start `mlflow "
            "server --allowed-hosts ...` on one and set tracking.uri=http://HOST:PORT, or put the file into "
            f"cluster.storage: tracking.uri={sqlite_address(storage / 'mlflow.db')}"
        )


def space_problems(config: Config) -> Iterator[str]:
    """Yield a problem if the storage has too little space for what a new run writes."""
    stages = describe(config).stages
    states = [stage.memory.weights + stage.memory.optimizer for stage in stages]  # weights include the moving average
    needed = KEPT_CHECKPOINTS * max(states) + sum(stage.table_bytes or 0 for stage in stages)
    free = free_bytes(Path(config.cluster.storage).absolute())
    if needed > free:
        yield (
            f"cluster.storage has {shown_bytes(free)} free; {KEPT_CHECKPOINTS} checkpoints and the logit tables of "
            f"this run need {shown_bytes(needed)}: free space, or choose another cluster.storage"
        )


def staging_problems(config: Config, manifest: Manifest, nodes: Sequence[Node]) -> Iterator[str]:
    """Yield the nodes whose disk has too little space for the data that they would download from data.uri."""
    if not config.data.uri:
        return
    for node in nodes:
        splits = (TRAIN, VALIDATION) if node.cpus else (VALIDATION,)
        needed = sum(manifest.splits[split].size_bytes for split in splits)
        if node.answer.data_digest != manifest.digest and node.answer.data_free_bytes < needed:
            yield (
                f"data.folder {config.data.folder} on {node.name} has {shown_bytes(node.answer.data_free_bytes)} free "
                f"and the data to download needs {shown_bytes(needed)}: free space, or choose another data.folder"
            )


def memory_notes(config: Config, manifest: Manifest, nodes: Sequence[Node]) -> Iterator[str]:
    """Yield a note if nodes will read training images from disk in random order in every epoch."""
    size = manifest.splits[TRAIN].size_bytes
    small = [node.name for node in nodes if node.cpus and node.answer.memory_bytes < size]
    if small and config.loader.window_pages is None:
        yield (
            f"train.beton ({shown_bytes(size)}) is larger than the memory of {', '.join(small)}, so reads are random; "
            "loader.window_pages=64 reads large pieces instead"
        )


def thread_notes(config: Config, nodes: Sequence[Node]) -> Iterator[str]:
    """Yield notes if more CPUs or threads are configured than exist."""
    for node in nodes:
        if node.cpus > node.answer.cpus:
            yield (
                f"Ray counts {number_of(node.cpus, 'CPU')} on {node.name}, but processes may use only "
                f"{node.answer.cpus}; start Ray there with --num-cpus={node.answer.cpus}"
            )
    asked, each = config.loader.num_threads, config.cluster.cpus_per_worker
    if asked and each and asked > each:
        yield f"loader.num_threads {asked} is more than cluster.cpus_per_worker {each}; remove it to use every CPU"
    fewest = min((node.answer.cpus for node in nodes if node.cpus), default=0)
    if asked and asked > fewest:
        yield f"loader.num_threads {asked} is more than the {fewest} CPUs of a node; remove it to use every CPU"


def cluster_notes() -> Iterator[str]:
    """Yield notes about the security of the cluster."""
    if os.environ.get(ADDRESS) and os.environ.get(MODE) != "token":
        yield (
            f"{MODE} is not token: anyone who reaches the cluster's ports can run code on it; start it with "
            f"{MODE}=token (docs/cluster.md)"
        )


def listed(some: Sequence[Node], everyone: Sequence[Node]) -> str:
    """Format the names of nodes."""
    return "every node" if len(some) == len(everyone) > 1 else ", ".join(node.name for node in some)
