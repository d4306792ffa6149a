"""The Ray Serve deployments of a model: a router that answers HTTP and, if split, one deployment per resolution.

A replica runs the code that is stored with the registered version. This module only decides where its programs run.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import mlflow
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Gauge, Histogram
from starlette.applications import Starlette
from torch import Tensor

from pipeline.config.schema import ServingConfig
from pipeline.serving.http import RETRY_SECONDS, UnavailableError, build_app
from pipeline.serving.pyfunc import CODE_FOLDER, FOLDER_ARTIFACT, PLACEMENT, REQUESTS_AT_ONCE, load_code

ARTIFACTS = f"artifacts/{FOLDER_ARTIFACT}"
"""Where a registered version stores its programs, their description and their code."""
META = "meta.json"
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
ATTEMPTS = 3
"""How many times a call to a resolution's deployment is sent if replicas die."""
REQUEST_TIMEOUT_SECONDS = 60.0
"""How long a request, or a call to a resolution's deployment, may take."""
DRAIN_SECONDS = 30.0
_LATENCIES = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]
_BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
METRICS = {
    "drnet_serve_images": "images answered, by the resolution whose answer counts",
    "drnet_serve_bad_images": "images that cannot be used",
    "drnet_serve_escalations": "images that ran again at this resolution, because an earlier one was not confident",
    "drnet_serve_gflops": "multiply-adds / 1e9 of all answers, with the predictor",
    "drnet_serve_seconds": "seconds from the complete request body to the answer, by the request's last resolution",
    "drnet_serve_batch": "images in a batch of a program",
    "drnet_serve_waiting": "images that wait for a program",
}
"""Descriptions of the replicas' metrics. Prometheus adds the prefix `ray_` to their names."""


class Served(BaseModel):
    """The settings of a served model, which are the arguments of its applications in Serve's configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """Address of the registered version: `models:/NAME/VERSION`."""
    tracking_uri: str | None = None
    """Address of the registry; None uses MLFLOW_TRACKING_URI on the replica's node."""
    split: Literal["together", "by_resolution"] = "together"
    """Whether one replica runs all programs (`together`), or each resolution has its own deployment (`by_resolution`).
    """
    resolution: int | None = None
    """The resolution of this application in pixels; None for the router."""
    serving: ServingConfig = ServingConfig()
    token_sha256: str | None = None
    """SHA-256 of the token that requests need, in hexadecimal; None accepts requests without a token."""

    @property
    def num_gpus(self) -> float:
        """The GPUs that a replica of this application reserves. The router of a `by_resolution` split reserves none."""
        is_router_alone = self.split == "by_resolution" and self.resolution is None
        return 0.0 if is_router_alone else self.serving.gpus_per_replica

    @property
    def placement(self) -> dict[str, Any]:
        """The arguments of the stored code's Placement.

        The device is `cpu` if the replica reserves no GPU, because Ray does not hide GPUs from such a replica.
        """
        device = PLACEMENT["device"] if self.num_gpus else "cpu"
        return PLACEMENT | {"device": device, "precision": self.serving.precision}

    @property
    def name(self) -> str:
        """The registered model's name."""
        return self.model.split("/")[1]

    @property
    def version(self) -> str:
        """The registered version's number."""
        return self.model.split("/")[2]

    def part_name(self, resolution: int) -> str:
        """Return the name of the application that serves a resolution."""
        return f"{self.name} v{self.version} {resolution}px"


def router(args: Served | Mapping[str, Any]) -> serve.Application:
    """Build the application that answers HTTP. Serve's configuration names this function and passes a mapping."""
    served = Served.model_validate(args)
    serving = served.serving
    options = _options(served) | {
        "max_ongoing_requests": REQUESTS_AT_ONCE,
        "max_queued_requests": serving.max_queued_requests,
        "backpressure_config": {"status_code": 503, "retry_after_s": RETRY_SECONDS},
    }
    return serve.deployment(serve.ingress()(Router), name="Router").options(**options).bind(served.model_dump())


def resolution(args: Served | Mapping[str, Any]) -> serve.Application:
    """Build the application of one resolution. Serve's configuration names this function and passes a mapping."""
    served = Served.model_validate(args)
    options = _options(served) | {"max_ongoing_requests": 2 * REQUESTS_AT_ONCE}
    return serve.deployment(Resolution, name="Resolution").options(**options).bind(served.model_dump())


def _options(served: Served) -> dict[str, Any]:
    serving = served.serving
    highest = serving.max_replicas or serving.min_replicas
    if highest == serving.min_replicas:
        replicas: dict[str, Any] = {"num_replicas": highest}
    else:
        scaling = {
            "min_replicas": serving.min_replicas,
            "max_replicas": highest,
            "target_ongoing_requests": serving.target_ongoing_requests,
            "upscale_delay_s": serving.scale_up_seconds,
            "downscale_delay_s": serving.scale_down_seconds,
        }
        replicas = {"autoscaling_config": scaling}
    return replicas | {
        "ray_actor_options": {"num_cpus": serving.cpus_per_replica, "num_gpus": served.num_gpus},
        # A replica of another version starts before one of this version stops.
        "max_surge_percent": 100,
        "graceful_shutdown_timeout_s": DRAIN_SECONDS,
    }


class Part(ABC):
    """The common part of both deployments: load the stored code, and the programs that run in this replica."""

    def __init__(self, served: Mapping[str, Any]):
        self.served = Served.model_validate(served)
        serving = self.served.serving
        self.num_threads = max(1, int(serving.cpus_per_replica))
        torch.set_num_threads(self.num_threads)
        registry = self.served.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not registry:
            raise ValueError(
                "the registry's address has a password, which Serve's configuration must not show; set "
                "MLFLOW_TRACKING_URI in the environment of every node"
            )
        mlflow.set_tracking_uri(registry)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / ARTIFACTS  # where MLflow places downloads
            for name in (META, CODE_FOLDER):
                self._fetch(name, temporary)
            self.code = load_code(folder / CODE_FOLDER)
            placement = self.code.Placement(**self.served.placement)
            about = self.code.RoutedNetwork(folder, placement, files=())
            files = self.files(about)
            for name in files:
                self._fetch(name, temporary)
            self.network = self.code.RoutedNetwork(folder, placement, files)
        self.batch_size = Histogram("drnet_serve_batch", METRICS["drnet_serve_batch"], _BATCHES, ("program",))

    @abstractmethod
    def files(self, network: Any) -> list[str]:
        """Return the names of the program files that this replica runs."""

    def _fetch(self, name: str, folder: str) -> None:
        mlflow.artifacts.download_artifacts(artifact_uri=f"{self.served.model}/{ARTIFACTS}/{name}", dst_path=folder)


class Router(Part):
    """Answer HTTP requests: decode images, run the predictor, apply the policy, and run or forward the crops."""

    def __init__(self, served: Mapping[str, Any]):
        super().__init__(served)
        network, split = self.network, self.served.split
        self.address = self.served.model
        names = ["predictor"] * network.is_routed + [f"{side} px" for side in network.resolutions]
        waits = Gauge("drnet_serve_waiting", METRICS["drnet_serve_waiting"], ("program",))

        def ran(program: int, size: int, waiting: int) -> None:
            self.batch_size.observe(size, {"program": names[program]})
            waits.set(waiting, {"program": names[program]})

        if split == "together":
            programs = self.code.program_queue(network, ran)
        else:
            apps = [self.served.part_name(side) for side in network.resolutions]
            handles = [serve.get_deployment_handle("Resolution", app) for app in apps]
            programs = SpreadPrograms(self.code.program_queue(network, ran), handles)
        self.classifier = self.code.Classifier(network, self.num_threads, programs)
        by_resolution = ("resolution",)
        self.images, self.escalations = (
            Counter(name, METRICS[name], by_resolution) for name in ("drnet_serve_images", "drnet_serve_escalations")
        )
        self.bad = Counter("drnet_serve_bad_images", METRICS["drnet_serve_bad_images"])
        self.gflops = Counter("drnet_serve_gflops", METRICS["drnet_serve_gflops"])
        self.seconds = Histogram("drnet_serve_seconds", METRICS["drnet_serve_seconds"], _LATENCIES, by_resolution)

    def files(self, network: Any) -> list[str]:
        predictor = [self.code.programs.PREDICTOR_FILE] * network.is_routed
        backbones = [network.backbone_file(index) for index in range(len(network.resolutions))]
        return [*predictor, *(backbones if self.served.split == "together" else [])]

    def __serve_build_asgi_app__(self) -> Starlette:
        serving = self.served.serving
        pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, "request")
        return build_app(self, pool, int(serving.max_body_mb * 1e6), self.served.token_sha256)

    def about(self) -> dict[str, Any]:
        """Return the model's version, classes, resolutions, costs and policies, as JSON values."""
        network = self.network
        return {
            "model": self.address,
            "name": self.served.name,
            "version": self.served.version,
            "split": self.served.split,
            "classes": list(network.classes),
            "resolutions": list(network.resolutions),
            "gflops": list(network.backbone_gflops),
            "predictor_gflops": network.predictor_gflops,
            "policy": network.default_policy.to_json(),
            "policies": [
                {"policy": found.policy.to_json(), "gflops": found.gflops, "accuracy": found.accuracy}
                for found in network.policies
            ],
        }

    def policy(self, name: str | None, given_params: Mapping[str, float]) -> Any:
        """Return the policy that a request asks for, by its name or by parameters of `RoutedNetwork.policy_for`.

        Raises:
            ValueError: a name and parameters are both given, or there is no such policy.
        """
        if name is not None and given_params:
            raise ValueError(f"policy and {' and '.join(given_params)} contradict each other; give one of them")
        return self.network.policy_for(**given_params) if name is None else self.network.named_policy(name)

    def classify(self, images: Sequence[Any], policy: Any, stop: threading.Event) -> list[Any]:
        """Classify images with a policy, update the metrics, and return a runtime.Answer for each image.

        Return early, without the answers that are still missing, once `stop` is set.
        """
        started = time.perf_counter()
        answers = []
        for answer in self.classifier.classify(images, policy):
            if stop.is_set():
                return answers
            answers.append(answer)
            if answer.error is not None:
                self.bad.inc()
                continue
            self.images.inc(tags={"resolution": str(answer.resolution)})
            self.gflops.inc(answer.gflops)
            for side in answer.resolutions.split(",")[1:]:
                self.escalations.inc(tags={"resolution": side})
        if answers and answers[-1].error is None:
            self.seconds.observe(time.perf_counter() - started, {"resolution": str(answers[-1].resolution)})
        return answers


class Resolution(Part):
    """Run the program of one resolution on the crops of all routers, in batches that Ray Serve collects."""

    def __init__(self, served: Mapping[str, Any]):
        super().__init__(served)
        serving, side = self.served.serving, self.served.resolution
        assert side is not None
        self.index = self.network.resolutions.index(side)
        size = serving.max_batch_size or self.code.programs.images_at_once(side, self.network.device)
        self.logits.set_max_batch_size(size)
        self.logits.set_batch_wait_timeout_s(serving.batch_wait_seconds)

    def files(self, network: Any) -> list[str]:
        return [network.backbone_file(network.resolutions.index(self.served.resolution))]

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0.0)
    async def logits(self, calls: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """Return logits (n, K) for the crops of each call, uint8 (n, S, S, 3)."""
        sizes = [len(crops) for crops in calls]
        images = torch.from_numpy(np.concatenate(calls))  # a copy: a call's array is read-only
        rows = await asyncio.to_thread(self.network.logits, self.index, images)
        self.batch_size.observe(len(images), {"program": f"{self.served.resolution} px"})
        return np.split(rows.numpy(), np.cumsum(sizes)[:-1])


class SpreadPrograms:
    """Run the predictor in this process, and each resolution in its own deployment.

    Args:
        predictor: queue that runs program 0.
        handles: deployments that run the other programs.
    """

    def __init__(self, predictor: Any, handles: Sequence[DeploymentHandle]):
        self._predictor, self._handles = predictor, handles

    def submit(self, program: int, images: Sequence[Tensor]) -> Sequence[Any]:
        """Run a program on images of one shape and return a row, which may still be computed, for each image."""
        if program == 0:
            return self._predictor.submit(0, images)
        if not images:
            return []
        call = Call(self._handles[program - 1], np.stack([image.numpy() for image in images]))
        return [RemoteRow(call, place) for place in range(len(images))]

    def close(self) -> None:
        """Close the predictor's queue."""
        self._predictor.close()


class Call:
    """The logits of one call to a resolution's deployment. The call is repeated if its replica dies."""

    def __init__(self, handle: DeploymentHandle, crops: NDArray[np.uint8]):
        self._handle, self._crops = handle, crops
        self._response = handle.logits.remote(crops)
        self._lock = threading.Lock()
        self._rows: Tensor | None = None

    def rows(self) -> Tensor:
        """Wait for the logits (n, K). Raise UnavailableError if no replica answers."""
        with self._lock:
            for attempt in range(ATTEMPTS):
                if self._rows is not None:
                    break
                try:
                    self._rows = torch.from_numpy(np.array(self._response.result(timeout_s=REQUEST_TIMEOUT_SECONDS)))
                except TimeoutError as error:
                    self._response.cancel()
                    raise UnavailableError(
                        f"a resolution of the model does not answer within {REQUEST_TIMEOUT_SECONDS:.0f} s"
                    ) from error
                except (RayActorError, DeploymentUnavailableError, RayServeException) as error:
                    if attempt == ATTEMPTS - 1:
                        raise UnavailableError(
                            f"a resolution of the model does not answer ({type(error).__name__})"
                        ) from error
                    self._response = self._handle.logits.remote(self._crops)
            assert self._rows is not None
            return self._rows


class RemoteRow:
    """The row of one image in a call's logits."""

    def __init__(self, call: Call, place: int):
        self._call, self._place = call, place

    def result(self) -> Tensor:
        """Wait for the logits (K,) and return them."""
        return self._call.rows()[self._place]
