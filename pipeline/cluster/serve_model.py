"""Run a registered model on Ray Serve, roll out another version of it, and follow an alias."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from datasets.parallel import available_cpus
from datasets.remote import redacted
from pipeline.cluster.connection import ADDRESS, ray_cluster
from pipeline.cluster.progress import show_line
from pipeline.cluster.signals import restored
from pipeline.config.schema import ServingConfig
from pipeline.serving.deployments import ARTIFACTS, META, REQUEST_TIMEOUT_SECONDS, Served, resolution, router
from pipeline.serving.http import digest_of
from pipeline.serving.runtime.programs import FORMAT
from pipeline.tracking.registry import download, find_model
from pipeline.tracking.store import TrackingError

TOKEN_VARIABLE, TOKEN_FILE_VARIABLE = "DRNET_SERVE_TOKEN", "DRNET_SERVE_TOKEN_FILE"
"""Environment variables that set the token that requests need, or the file that contains it."""
SHORTEST_TOKEN = 16
REPLACEMENT_TIMEOUT_SECONDS = 600.0
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True)
class Plan:
    """The applications that serve one version of a model."""

    router: Served
    parts: tuple[Served, ...]
    """One application for each resolution that has its own deployment."""
    has_policies: bool

    @property
    def num_cpus(self) -> float:
        """The number of CPUs that the smallest number of replicas needs."""
        serving = self.router.serving
        return serving.cpus_per_replica * serving.min_replicas * (1 + len(self.parts))

    @property
    def address(self) -> str:
        """The address at which the model answers."""
        host = self.router.serving.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.router.serving.port}"


def plan_for(
    model_uri: str, serving: ServingConfig, token: str | None, num_gpus: float = 0.0, registry: str | None = None
) -> Plan:
    """Look up a model and decide what to run, without using a cluster.

    Args:
        model_uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        token: token that requests must send; None requires none.
        num_gpus: number of GPUs in the cluster.
        registry: address of the registry; None means the address that `tracking_uri()` returns.

    Raises:
        ValueError: the address, the token or the settings are not possible together.
        TrackingError: there is no such model, or an older jobs.register created it.
    """
    if not re.fullmatch(r"models:/[^/@]+(@[^/@]+|/\d+)", model_uri):
        raise ValueError(f"--model is {model_uri}. Give models:/NAME@ALIAS or models:/NAME/VERSION.")
    if token is None and not _is_own_machine(serving.host):
        raise ValueError(
            f"serving.host is {serving.host}, so others can reach the model, but there is no token. Set "
            f"{TOKEN_VARIABLE} or {TOKEN_FILE_VARIABLE}, or serving.host=127.0.0.1."
        )
    found = find_model(model_uri, registry=registry)
    with tempfile.TemporaryDirectory() as temporary:
        about = json.loads(download(found, f"{ARTIFACTS}/{META}", Path(temporary)).read_text())
    if about.get("format", 1) < FORMAT:
        raise TrackingError(
            f"{found.uri} cannot be served here: an older jobs.register created it. Register its run again, or use "
            "`mlflow models serve`."
        )
    common = Served(
        model=found.uri,
        # Serve's configuration must not show a password. An address with one must be in the nodes' environment.
        tracking_uri=found.tracking_uri if redacted(found.tracking_uri) == found.tracking_uri else None,
        split=choose_split(serving, len(about["resolutions"]), num_gpus),
        serving=serving,
        token_sha256=token and digest_of(token),
    )
    sides = about["resolutions"] if common.split == "by_resolution" else []
    parts = tuple(common.model_copy(update={"resolution": side, "token_sha256": None}) for side in sides)
    return Plan(common, parts, has_policies=bool(about.get("policies")))


def choose_split(serving: ServingConfig, num_resolutions: int, num_gpus: float) -> Literal["together", "by_resolution"]:
    """Return whether each replica runs all programs, or each resolution has its own deployment.

    A call to another deployment costs milliseconds of CPU time, so resolutions are separate only if each has a GPU.

    Raises:
        ValueError: there is only one resolution to split.
    """
    if serving.split == "by_resolution" and num_resolutions == 1:
        raise ValueError(
            "serving.split is by_resolution, but the model has one resolution. Set serving.split=together."
        )
    if serving.split != "auto":
        return serving.split
    needed = serving.gpus_per_replica * serving.min_replicas * num_resolutions
    return "by_resolution" if num_resolutions > 1 and 0 < needed <= num_gpus else "together"


def read_token() -> str | None:
    """Return the token in DRNET_SERVE_TOKEN or in the file DRNET_SERVE_TOKEN_FILE, or None if neither is set.

    Raises:
        ValueError: the token is short enough to guess, or clients cannot send it.
        OSError: the file cannot be read.
    """
    file = os.environ.get(TOKEN_FILE_VARIABLE)
    given = os.environ.get(TOKEN_VARIABLE) or (Path(file).read_text() if file else None)
    token = None if given is None else given.strip()  # a file, and a variable set from it, may end with a line break
    if token and not (token.isascii() and token.isprintable()):
        raise ValueError("the token has a character that is not printable ASCII. Use `openssl rand -hex 32`.")
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise ValueError(f"the token has {len(token)} characters. Give at least {SHORTEST_TOKEN} random ones.")
    return token


def serve_config(plan: Plan) -> dict[str, Any]:
    """Return the configuration that `serve deploy` takes and that a RayService contains."""
    serving = plan.router.serving
    applications = [
        {
            "name": name,
            "route_prefix": "/" if builder == "router" else None,
            "import_path": f"{router.__module__}:{builder}",
            "args": served.model_dump(mode="json", exclude_defaults=True),
        }
        for name, builder, served in _applications(plan)
    ]
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": serving.host, "port": serving.port, "request_timeout_s": REQUEST_TIMEOUT_SECONDS},
        "logging_config": _LOGGING,
        "applications": applications,
    }


def _applications(plan: Plan) -> Iterator[tuple[str, str, Served]]:
    """Yield name, builder and arguments of each application, the router last."""
    for part in plan.parts:
        assert part.resolution is not None
        yield part.part_name(part.resolution), "resolution", part
    yield plan.router.name, "router", plan.router


def serve_model(
    model_uri: str,
    serving: ServingConfig,
    token: str | None,
    *,
    follow_alias: bool = False,
    registry: str | None = None,
    show: Callable[[str], None] = show_line,
) -> None:
    """Run a model, or roll it out if another version of it is running.

    On a cluster (RAY_ADDRESS, a Ray job) the model keeps running when this function returns. Otherwise this machine
    serves until SIGTERM or Ctrl-C, and requests in progress are answered first. With `follow_alias`, the alias is
    checked every `serving.follow_seconds`, and the version that has it is rolled out. `registry` is as in `plan_for`.

    Raises:
        ValueError: as in `plan_for`; or the port is in use, or the cluster is too small.
        TrackingError: as in `plan_for`.
        ChildProcessError: the replicas do not start; a version that ran before keeps running.
    """
    plan = plan_for(model_uri, serving, token, registry=registry)
    is_private = not ray.is_initialized() and (os.environ.get(ADDRESS) or "local") == "local"
    cores = available_cpus()
    if is_private:
        _require_free_port(serving)
        _require_room(plan, cores)
    # On this machine Ray only counts CPUs. Twice as many leave room for the replicas of the next version.
    with ray_cluster(2 * cores):
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        plan = plan_for(model_uri, serving, token, ray.cluster_resources().get("GPU", 0.0), registry)
        _require_room(plan, cores if is_private else ray.cluster_resources().get("CPU", 0.0))
        if not plan.has_policies:
            show(f"{plan.router.model} has no fitted policies, so a budget in a request is refused")
        deploy(plan)
        show(f"{plan.router.model} answers at {plan.address} ({plan.router.split.replace('_', ' ')})")
        if not follow_alias and not is_private:
            return
        with _stop_event() as stop:
            failed: set[str] = set()
            while not stop.wait(serving.follow_seconds if follow_alias else None):
                plan = _follow(plan, model_uri, token, show, failed, registry)
            if is_private:
                show("stopping: the requests in progress are answered")
                serve.delete(plan.router.name)
                serve.shutdown()


def _follow(
    plan: Plan,
    model_uri: str,
    token: str | None,
    show: Callable[[str], None],
    failed: set[str],
    registry: str | None = None,
) -> Plan:
    """Roll out the version that has the alias now. Return the plan that runs afterwards.

    If the version does not start, `plan` is deployed again. After a failed deployment Serve starts no replicas, so
    otherwise it would not replace a lost replica of `plan` either. Deploying `plan` again replaces all of its replicas.
    Therefore a version that failed is not retried until the alias has moved.

    Args:
        failed: versions that have failed to start since the alias moved; this function changes the set.
    """
    try:
        num_gpus = ray.cluster_resources().get("GPU", 0.0)
        newest = plan_for(model_uri, plan.router.serving, token, num_gpus, registry)
    except (ValueError, OSError) as error:
        show(f"{plan.router.model} keeps running: {error}")
        return plan
    failed &= {newest.router.model}
    wanted = [newest, plan]
    if newest.router.model == plan.router.model or newest.router.model in failed:
        if not _has_failed(plan):
            return plan
        wanted = [plan]
    else:
        show(f"{model_uri} is {newest.router.model} now; rolling it out")
    for each in wanted:
        try:
            deploy(each)
        except (ValueError, OSError) as error:
            failed.add(each.router.model)
            show(f"{plan.router.model} keeps running: {error}")
        else:
            show(f"{each.router.model} answers at {each.address}")
            return each
    return plan


def _has_failed(plan: Plan) -> bool:
    """Return whether Serve gave up on one of a plan's applications."""
    running = serve.status().applications
    names = [name for name, _, _ in _applications(plan) if name in running]
    return any(running[name].status == ApplicationStatus.DEPLOY_FAILED for name in names)


def deploy(plan: Plan) -> None:
    """Start the replicas of a version, switch requests to them, then stop the replicas of other versions.

    Raises:
        ValueError: Serve listens at another address, or runs another application at /.
        ChildProcessError: the replicas do not start.
    """
    serving = plan.router.serving
    options = {"host": serving.host, "port": serving.port, "request_timeout_s": REQUEST_TIMEOUT_SECONDS}
    serve.start(proxy_location="EveryNode", http_options=options, logging_config=_LOGGING)
    _require_address(serving)
    *parts, (name, _, _) = _applications(plan)
    others = [app for app, about in serve.status().applications.items() if app != name and _at_root(app)]
    if others:
        raise ValueError(
            f"Serve runs {others[0]!r} at / already. Stop it with `serve shutdown`, or use another cluster."
        )
    targets = [serve.RunTarget(resolution(part), app, None, _LOGGING) for app, _, part in parts]
    try:
        if targets:
            serve.run_many(targets)
        serve.run(router(plan.router), name=name, route_prefix="/", logging_config=_LOGGING)
    except (RuntimeError, RayServeException) as error:
        raise ChildProcessError(f"the replicas of {plan.router.model} do not start: {_cause(error)}") from None
    _wait_for_replacement(name)
    current = {app for app, _, _ in parts}
    for app in serve.status().applications:
        if re.fullmatch(rf"{re.escape(name)} v\d+ \d+px", app) and app not in current:
            serve.delete(app)


def _cause(error: Exception) -> str:
    """Return the last line of the exception that a replica raised, if Serve knows it."""
    found = [about.message for app in serve.status().applications.values() for about in app.deployments.values()]
    lines = [
        line
        for message in found
        for line in message.strip().splitlines()
        if re.match(r"\w[\w.]*(Error|Exception)", line)
    ]
    return lines[-1] if lines else str(error)


def _at_root(app: str) -> bool:
    return serve.context._get_global_client().get_serve_details()["applications"][app]["route_prefix"] == "/"


def _wait_for_replacement(name: str) -> None:
    """Wait until no replica of an older version answers requests, because until then it needs its deployments."""
    deadline = time.monotonic() + REPLACEMENT_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        app = serve.status().applications[name]
        states = [state for about in app.deployments.values() for state in about.replica_states]
        if app.status == ApplicationStatus.RUNNING and not {"STOPPING", "UPDATING"} & set(states):
            return
        time.sleep(0.2)
    raise ChildProcessError(f"the replicas of {name} are not replaced after {REPLACEMENT_TIMEOUT_SECONDS:.0f} s")


def _require_address(serving: ServingConfig) -> None:
    """Raise ValueError if Serve already listens at another address, which cannot change while Serve runs."""
    given = serve.context._get_global_client().http_config
    if (given.host, given.port) != (serving.host, serving.port):
        raise ValueError(
            f"Serve listens at {given.host}:{given.port} already, not at {serving.host}:{serving.port}. Set "
            "serving.host and serving.port to that address, or run `serve shutdown` first."
        )


def _require_free_port(serving: ServingConfig) -> None:
    with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in serving.host else socket.AF_INET)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((serving.host, serving.port))
        except OSError as error:
            raise ValueError(
                f"port {serving.port} of {serving.host} cannot be used ({error.strerror}). Set serving.port to another "
                f"one. If jobs.serve runs there, start it with --follow-alias, or on a cluster with {ADDRESS}."
            ) from None


def _require_room(plan: Plan, num_cpus: float) -> None:
    if plan.num_cpus > num_cpus:
        raise ValueError(
            f"the replicas need {plan.num_cpus:g} CPUs, but there are {num_cpus:g}. Lower serving.cpus_per_replica or "
            "serving.min_replicas, or set serving.split=together."
        )


def _is_own_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _stop_event() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    with restored(signal.SIGTERM, signal.SIGINT) as in_main_thread:
        if in_main_thread:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
        yield stop
