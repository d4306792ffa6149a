"""pipeline/cluster/progress.py: log lines name run, stage and rank. tests/ray/test_submit.py covers the gauges."""

from __future__ import annotations

import logging

import pytest

from pipeline.cluster.progress import LOGGERS, labeled_logs


def test_log_lines_have_run_stage_and_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with labeled_logs("letters", 3) as labels:
        logging.getLogger("datasets.loading.loader").warning("one %s", "image")
        labels.stage = "joint"
        logging.getLogger("pipeline.tracking").info("sent")
        logging.getLogger("elsewhere").warning("of another library")

    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("WARNING run=letters stage=- rank=3 datasets.loading.loader: one image")
    assert second.endswith("INFO run=letters stage=joint rank=3 pipeline.tracking: sent")


def test_logging_is_restored_afterwards() -> None:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    with labeled_logs("letters", 0):
        assert all(logger.handlers for logger in loggers)
    assert [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers] == before
