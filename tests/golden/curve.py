"""The curve that is compared: the losses of one fixed run of all three stages."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.training.loop import train
from tests.synthetic import Recorder, config_of, run_of

FILE = Path(__file__).with_name("losses.json")


def losses() -> dict[str, list[float]]:
    """Mean loss of every step, by stage."""
    recorder, threads = Recorder(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(run_of(config_of(), recorder))
    finally:
        torch.set_num_threads(threads)
    curve: dict[str, list[float]] = {}
    for progress, loss in recorder.steps:
        curve.setdefault(progress.stage, []).append(loss)
    return curve
