"""What every node of a cluster is like, found out on the node itself."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from datasets.beton import Manifest, load_manifest, verify_betons
from datasets.parallel import available_cpus
from datasets.staging import remote_manifest

SECONDS_TO_ANSWER = 120.0
LIBRARIES = ("ray", "torch", "torchvision", "ffcv", "numba", "numpy", "mlflow", "pyarrow", "pydantic", "xxhash")
TOKEN_FILE = Path(".ray") / "auth_token"
"""where Ray looks for a token, below the home folder"""


@dataclass(frozen=True)
class Request:
    """What to look at.

    Attributes:
        mark: a folder in the storage in which the driver has left a file, to be read and joined by another.
        tracking_uri: None where there is no server to be asked.
        tokens: whether to look at files with Ray's token.
        thorough: also what takes seconds: bytes of the data, GPUs, the data's address, the tracking server.
    """

    mark: Path
    data_folder: Path
    data_uri: str | None = field(repr=False)
    tracking_uri: str | None = field(repr=False)
    tokens: bool
    thorough: bool


@dataclass(frozen=True)
class Answer:
    """What a process on a node found. Problems say what to change, and not on which node."""

    host: str
    versions: Mapping[str, str]
    cpus: int
    """that processes there may use"""
    gpus: int | None
    """that torch sees; None where nobody looked"""
    memory_bytes: int
    data_digest: str | None
    """of what data.folder holds, or None"""
    data_free_bytes: int
    storage_free_bytes: int
    problems: list[str]


@dataclass(frozen=True)
class Node:
    """A node of the cluster: what Ray says of it, and its answer."""

    name: str
    is_driver: bool
    cpus: int
    gpus: int
    answer: Answer


def probe_nodes(request: Request) -> tuple[list[Node], list[str]]:
    """Ask every node of the connected cluster, the driver's own without a task.

    Returns:
        The nodes, and a problem for each that gives no answer.
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
            found = ray.get(task, timeout=SECONDS_TO_ANSWER) if task else answer(request, node["NodeID"], gpus)
            nodes.append(Node(name, task is None, cpus, gpus, found))
        except GetTimeoutError:
            problems.append(
                f"{name} does not answer within {SECONDS_TO_ANSWER:.0f} s; look whether its disks and network file "
                "systems answer (df), and whether it has memory left"
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
    """Look at the machine that this runs on; `gpus` are those that Ray counts there."""
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
    """A folder in the storage with the driver's mark in it, for as long as nodes are asked.

    Raises:
        OSError: the driver cannot write there.
    """
    mark = storage / f".doctor-{secrets.token_hex(8)}"
    mark.mkdir(parents=True)
    try:
        (mark / "driver").write_text(mark.name)
        yield mark
    finally:
        shutil.rmtree(mark, ignore_errors=True)


def token_problems() -> Iterator[str]:
    """A file that Ray takes the token from and that others can read."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / TOKEN_FILE)
    if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        mode = stat.S_IMODE(path.stat().st_mode)
        yield f"others can read the token in {path} (mode {mode:o}), and so run anything here: chmod 600 {path}"


def free_bytes(path: Path) -> int:
    """Free space where a folder is, or would be made; 0 where that cannot be told."""
    try:
        return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
    except OSError:
        return 0


def _storage_problems(mark: Path, node_id: str) -> Iterator[str]:
    try:
        if (mark / "driver").read_text() == mark.name:
            (mark / node_id).write_text(mark.name)
            return
        found = "another file is there"
    except OSError as error:
        found = f"{error.strerror}: {error.filename}"
    yield (
        f"cluster.storage {mark.parent} is not the folder that the driver writes to ({found}); mount one file system "
        "there on every node, writable for the user that Ray runs as"
    )


def _data_digest(request: Request, problems: list[str]) -> str | None:
    """Of what data.folder holds; why there is nothing usable goes into `problems`, unless it will be staged there."""
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
    """By a process of its own: from this one, which asked Ray for no GPU, Ray hides them."""
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    script = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    return int(found.stdout) if found.returncode == 0 else 0
