"""pipeline/cluster/progress.py: log lines name run, stage and rank. tests/ray/test_submit.py covers the gauges."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from datasets.beton import FORMAT, Manifest, Split
from pipeline.cluster.progress import LOGGERS, Labels, labeled_logs
from pipeline.cluster.worker import WorkerReporter, WorkerSettings
from pipeline.training.run import Goodput
from tests.conftest import ROOT
from tests.synthetic import config_of


def test_log_lines_have_run_stage_and_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with labeled_logs("letters", 3) as labels:
        logging.getLogger("datasets.loading.loader").warning("one %s", "image")
        labels.stage = "joint"
        logging.getLogger("pipeline.tracking").info("sent")
        logging.getLogger("elsewhere").warning("of another library")

    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("WARNING run=letters stage=- rank=3 datasets.loading.loader: one image")
    assert second.endswith("INFO run=letters stage=joint rank=3 pipeline.tracking: sent")


def test_names_that_are_not_utf8_are_shown_with_escapes(tmp_path: Path) -> None:
    script = (
        "import logging, pathlib, sys; from pipeline.cluster.progress import append_event, event_writer, followed\n"
        "from pipeline.cluster.progress import labeled_logs; folder = pathlib.Path(sys.argv[1])\n"
        "name = b'caf\\xe9'.decode('utf-8', 'surrogateescape')\n"
        "event_writer(None)(f'worker {name}')\n"
        "with followed(folder), labeled_logs('letters', 0):\n"
        "    append_event(folder, {'message': f'driver {name}'})\n"
        "    logging.getLogger('pipeline').warning('log %s', name)\n"
    )
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=strict, capture_output=True, check=True
    )
    assert done.stdout.splitlines() == [rb"worker caf\udce9", rb"driver caf\udce9"]
    assert done.stderr.endswith(rb"pipeline: log caf\udce9" + b"\n")


def test_the_speed_of_steps_counts_the_images_that_they_have(tmp_path: Path) -> None:
    """65 images in batches of at most 64 make two steps, of 33 and 32 images."""
    splits = {"train": Split("train.beton", 65, [65], 1, "0" * 64, {})}
    manifest = Manifest(FORMAT, "glyphs", ["A"], {}, (0.5,) * 3, (0.2,) * 3, "0" * 64, [], {}, splits)
    config = config_of(training={"batch_size": 64})
    settings = WorkerSettings(config, tmp_path, manifest.digest, tracking=None)
    reporter = WorkerReporter(settings, 0, manifest, Goodput(), Labels("letters", 0))
    assert reporter.clock.images_per_step == 32.5


def test_logging_is_restored_afterwards() -> None:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    with labeled_logs("letters", 0):
        assert all(logger.handlers for logger in loggers)
    assert [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers] == before
