"""Settings and fixtures of the whole suite.

The settings come before the imports that read them: thread counts that do not depend on the machine, no cluster and no
tracking server except those that a test starts, and no usage reports over the network.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.s3_server import S3Server, s3_server

if TYPE_CHECKING:
    from pipeline.config.schema import Config

ROOT = Path(__file__).resolve().parent.parent
WRITTEN_BY_RUNS = ("data", "runs", "mlruns", "mlartifacts", "mlflow.db")

os.environ["NUMBA_NUM_THREADS"] = "2"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # otherwise Ray creates one in the home folder
os.environ["RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT"] = "1"  # tests wait until a broken model has used up its retries
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
settings.register_profile("suite", deadline=None)  # a busy machine is no failure
settings.load_profile("suite")
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` if there is no CUDA device."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _project_folder_untouched() -> Iterator[None]:
    """Fail if a test wrote a run, a data set or a tracking store into the project instead of its tmp_path.

    Only in CI: elsewhere a job may run at the same time.
    """
    if "CI" not in os.environ:
        yield
        return
    before = {name for name in WRITTEN_BY_RUNS if (ROOT / name).exists()}
    yield
    written = [name for name in WRITTEN_BY_RUNS if (ROOT / name).exists() and name not in before]
    assert not written, f"a test wrote {', '.join(written)} into the project folder; give it a path under tmp_path"


@pytest.fixture(autouse=True)
def _no_tracking_store_of_another_test() -> Iterator[None]:
    """Remove the address that MLflow puts into the environment, where it overrides configurations."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Start the session's one Ray cluster: local, 4 CPUs, no GPU, token authentication. Yield its address.

    Starting Ray takes half a minute on two cores, so tests share one cluster. This process is its driver; a job in
    another process connects with RAY_ADDRESS set to the address, and inherits the token.
    """
    import ray

    with pytest.MonkeyPatch.context() as patch:
        # Ray Train's PlacementGroupCleaner asks the dashboard whether the controller lives. Without a dashboard it asks
        # the cluster in /tmp/ray/ray_current_cluster, which may be dead: each run would end 12 s later. Only this
        # cluster's processes get the variable, because it overrides the addresses of JobSubmissionClient.
        patch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
        context = ray.init(
            address="local",
            num_cpus=4,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=256 * 1024**2,
            log_to_driver=False,
            logging_level="WARNING",
        )
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare data and an MLflow store for small runs; 203 images give two ranks unequal parts of a batch."""
    from datasets.prepare.prepare import prepare
    from datasets.sources.glyphs import GlyphSettings
    from tests.chaos.runs import NUM_TRAIN
    from tests.unit.tracking_fixtures import fresh_store

    folder = tmp_path_factory.mktemp("small-runs")
    glyphs = GlyphSettings(num_train=NUM_TRAIN, num_validation=50, image_size=64)
    prepare("glyphs", folder / "data", glyphs=glyphs, num_processes=1, show_progress=False)
    fresh_store(folder, tmp_path_factory)
    return folder


@pytest.fixture(scope="session")
def undisturbed(folder: Path, ray_cluster: str) -> Config:
    """Train a small run of all stages on two workers, and return its configuration."""
    from pipeline.cluster.driver import train_run
    from tests.chaos.runs import config_of

    config = config_of(folder, "undisturbed")
    train_run(config)
    return config


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """Start the session's one S3 server, and set keys that it accepts."""
    with pytest.MonkeyPatch.context() as patch, s3_server() as server:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield server
