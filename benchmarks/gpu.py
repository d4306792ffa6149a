"""bench gpu: training steps and routed inference on a GPU in bfloat16, and their share of the GPU's limit.

Needs torch and torchvision, but not Ray, MLflow or FFCV: the images are in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import Row, compare

NETWORK = "resnet50"
BATCH = 256
BACKBONE = "backbone stage"
CALLS = {1: 30, 64: 20, 256: 10}
"""The number of calls per run, by batch size of inference."""
MATRIX, PRODUCTS = 8192, 20


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure all rows of the table, and return them with notes.

    Raises:
        ValueError: there is no GPU, or `images` is given.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError("bench gpu needs a GPU that PyTorch sees. Run python -m jobs.doctor to check it")
    if images is not None:
        raise ValueError(f"--images {images} is not possible: bench gpu generates its own images. Omit --images")
    torch.set_num_threads(threads)
    peak = peak_tflops()
    notes = [
        f"{NETWORK}, 100 classes, bfloat16 autocast; training: batches of {BATCH}, SGD with momentum; peers: default "
        "memory layout, all resolutions' graphs at once, one backward",
        f"the GPU's limit, a bfloat16 product of two {MATRIX} x {MATRIX} matrices: {peak:.0f} TFLOP/s",
    ]
    rows = []
    for found, lines in (*_inference(runs), *_training(runs, peak)):
        rows += found
        notes += lines
    return rows, notes


def peak_tflops() -> float:
    """Return the TFLOP/s of a matrix product of random numbers. Zeros would be faster."""
    import torch

    left, right = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(PRODUCTS):
        left @ right
    torch.cuda.synchronize()
    return 2e-12 * PRODUCTS * MATRIX**3 / (time.perf_counter() - started)


def _training(runs: int, peak: float) -> Iterator[tuple[list[Row], list[str]]]:
    from benchmarks.inference import build_model
    from benchmarks.step import WORK
    from pipeline.models.cost import measure_costs

    # Forward and backward at every resolution take three times the multiply-adds of a forward pass.
    gflops = 2 * 3 * sum(measure_costs(build_model(NETWORK).model).backbone_gflops)

    def share(row: Row) -> str:
        tflops = row.ours * gflops / 1e3
        limit = f"{100 * tflops / peak:.0f} % of the GPU's limit"
        return f"{row.name}: {row.ours:,.0f} images/s, {tflops:.0f} TFLOP/s, {limit}"

    for name, work in WORK.items():
        speed, memory = _compared(name, "speed", work, runs), _compared(name, "memory", work, runs)
        yield [speed, memory], [share(speed)] if name == BACKBONE else []
    row = _compared(f"{BACKBONE}, compiled", "speed", WORK[BACKBONE], runs, compiled=True)
    yield [row], [share(row)]


def _compared(name: str, value: str, work: Mapping[str, Any], runs: int, **ours_alone: Any) -> Row:
    from benchmarks.step import naive, ours

    given: dict[str, Any] = {
        "value": value,
        "batch": BATCH,
        "backbone": NETWORK,
        "device": "cuda",
        "precision": "bfloat16",
        **work,
    }
    mine, peer = ours(**given, **ours_alone), naive(**given)
    next(mine), next(peer)
    unit, what = ("images/s", name) if value == "speed" else ("MB", f"{name}, memory of a step")
    return compare(what, unit, mine.__next__, peer.__next__, runs, more_is_better=value == "speed")


def _inference(runs: int) -> Iterator[tuple[list[Row], list[str]]]:
    from benchmarks.inference import FixedMix, build_model, program_rows
    from pipeline.serving.export import export_model
    from pipeline.serving.runtime.programs import Placement

    with TemporaryDirectory(prefix="bench-gpu-") as scratch:
        export_model(build_model(NETWORK), Path(scratch))
        network = FixedMix(Path(scratch), Placement("cuda", "bfloat16"))
        yield program_rows(NETWORK, network, runs, CALLS)
