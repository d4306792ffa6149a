"""Connect a job to its Ray cluster, and run work on it as tasks."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import grpc
import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, WorkerCrashedError

from datasets.parallel import CHUNKS_AHEAD

ADDRESS, TEMPORARY = "RAY_ADDRESS", "RAY_TMPDIR"
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Ray's environment variables for authentication."""
TLS = "RAY_USE_TLS"
TOKEN_FILE = Path(".ray") / "auth_token"
"""The file in which Ray looks for a token, relative to the home folder."""
SECONDS_TO_CONNECT, SECONDS_TO_ANSWER = 3.0, 10.0
HEAD_METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""A request with an empty message that only Ray's head answers."""
_HEAD_ADDRESS = (
    "Use HOST:6379, the address that `ray start --head` prints, or submit the command with `ray job submit`."
)
_USUAL_MISTAKES = {8265: "8265 is the port of the dashboard. ", 10001: "10001 is the port of Ray Client. "}


@contextmanager
def ray_cluster(num_cpus: int | None = None) -> Iterator[None]:
    """Use the connected cluster if there is one, else connect to RAY_ADDRESS, else start a private local cluster.

    Ray sets RAY_ADDRESS inside a Ray job. A cluster that happens to run on this machine is not joined, because it may
    be the private cluster of another run and would end with it.

    Args:
        num_cpus: CPUs of a private cluster; None is as many as this machine has.

    Raises:
        ConnectionError: no head answers at RAY_ADDRESS.
        OSError: no folder for Ray's session can be written.
    """
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "WARNING"}
    address = os.environ.get(ADDRESS)
    if address and address != "local":
        require_head(address)
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            raise ConnectionError(f"{ADDRESS} is {address}, but Ray cannot connect: {error}") from error
    else:
        _prepare_local_cluster()
        ray.init(address="local", include_dashboard=False, num_cpus=num_cpus, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def require_head(address: str) -> None:
    """Check that the head of a Ray cluster answers at the value of RAY_ADDRESS.

    Without this check Ray retries for many minutes, and does not name the variable.

    Raises:
        ConnectionError: the head does not answer, something else does, or it refuses this process's token. If Ray uses
            TLS, only the connection is checked.
    """
    if address == "auto":  # Ray looks for a head on this machine, and fails at once without one
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ConnectionError(f"{ADDRESS} is {address}, but these jobs need HOST:PORT of the head. {_HEAD_ADDRESS}")
    advice = f"{_USUAL_MISTAKES.get(int(port), '')}{_HEAD_ADDRESS}"
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_CONNECT).close()
    except socket.gaierror as error:
        raise ConnectionError(
            f"{ADDRESS} is {address}, but no host {host} is known ({error.strerror}). {advice}"
        ) from None
    except TimeoutError:
        raise ConnectionError(
            f"{ADDRESS} is {address}, but nothing answers within {SECONDS_TO_CONNECT:.0f} s: its host is down, or a "
            f"firewall drops the connection. {advice}"
        ) from None
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"{ADDRESS} is {address}, but no connection is possible ({error}). {advice}") from None
    if os.environ.get(TLS, "").lower() in ("1", "true"):  # as Ray does; the request below is not encrypted
        return
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            token = _token() if os.environ.get(MODE, "").lower() == "token" else None  # as Ray does
            sent = [("authorization", f"Bearer {token}")] if token else []
            channel.unary_unary(HEAD_METHOD)(b"", timeout=SECONDS_TO_ANSWER, metadata=sent)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise ConnectionError(
                    f"{ADDRESS} is {address}, whose head {'refuses this token' if token else 'needs a token'}. Set "
                    f"{MODE}=token, and put the head's token into ~/{TOKEN_FILE} or {TOKEN}."
                ) from None
            if isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ConnectionError(
                    f"{ADDRESS} is {address}, but what listens there does not answer within {SECONDS_TO_ANSWER:g} s: "
                    f"the head is overloaded, or it is something else. {advice}"
                ) from None
            raise ConnectionError(f"{ADDRESS} is {address}, but something else listens there. {advice}") from None


def token_file() -> Path | None:
    """Return the path where Ray looks for a token, or None if this user has no home folder."""
    try:
        return Path(os.environ.get(TOKEN_PATH) or Path.home() / TOKEN_FILE)
    except RuntimeError:
        return None


def _token() -> str | None:
    if given := os.environ.get(TOKEN):
        return given
    try:
        return file.read_text().strip() if (file := token_file()) else None
    except OSError:
        return None


def _prepare_local_cluster() -> None:
    """Give a private cluster its own token and a folder that this user can write to.

    Otherwise Ray would write a token that other users can read into the home folder, which may not exist in a
    container.
    """
    if _token() is None:
        os.environ[TOKEN] = secrets.token_hex(32)
    # At every start Ray warns that authentication is on, which is intended.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    parent = Path(os.environ.get(TEMPORARY) or os.environ.get("TMPDIR") or "/tmp")
    folder = parent / "ray"
    if os.access(folder if folder.exists() else parent, os.W_OK | os.X_OK):
        return
    if TEMPORARY in os.environ:
        raise OSError(f"{TEMPORARY} is {parent}, but this user cannot write to {folder}. Set it to a writable folder.")
    try:
        os.environ[TEMPORARY] = tempfile.mkdtemp(prefix="ray-")
    except OSError as error:
        raise OSError(f"Ray finds no writable folder for its session ({error}). Set {TEMPORARY} to one.") from None


Work = TypeVar("Work")
Result = TypeVar("Result")


def map_on_cluster(function: Callable[[Work], Result], work: Iterable[Work], /) -> Generator[Result, None, None]:
    """Yield `function(item)` for every item of `work`, in order. Each item is computed by a Ray task of one CPU.

    This connects to the cluster when the first item is requested. At most CHUNKS_AHEAD tasks per CPU of the cluster are
    running or waiting, so memory does not grow with the work. Ray retries a task whose worker or machine dies.

    Raises:
        ChildProcessError: the workers of a task died repeatedly, for example because memory ran out.
    """
    with ray_cluster():
        shipped, remaining = ray.put(function), iter(work)
        pending: deque[ray.ObjectRef] = deque()
        try:
            while True:
                wanted = CHUNKS_AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(pending)
                pending.extend(_apply.remote(shipped, item) for item in islice(remaining, max(wanted, 0)))
                if not pending:
                    return
                yield ray.get(pending.popleft())
        except (WorkerCrashedError, ObjectLostError, OutOfMemoryError) as error:
            raise ChildProcessError(f"A Ray task failed, and so did every retry: {error}") from None
        finally:
            for task in pending:
                ray.cancel(task)


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def _apply(function: Callable[[Work], Result], item: Work) -> Result:
    return function(item)
