"""bench inference: what routing saves in seconds, in one process, from JPEG bytes and over HTTP."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from jobs.benchmarks.harness import Row, compare
from jobs.benchmarks.photographs import write_photographs

NETWORKS = ("resnet50", "resnet18")
SERVED = "resnet18"
NUM_IMAGES, PASSES = 128, 4


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """All rows of the table, and notes on them."""
    import torch

    from jobs.benchmarks.inference_sides import FixedMix, build_model, program_rows
    from pipeline.tracking.export import export_model

    torch.set_num_threads(threads)
    rows: list[Row] = []
    notes = [f"{threads} threads; 100 classes, a third of the images at each of 224, 168 and 112 px, predictor 3"]
    with TemporaryDirectory(prefix="bench-inference-") as scratch:
        photographs = write_photographs(Path(scratch) / "images", images, NUM_IMAGES)
        files = [path.read_bytes() for path in sorted(photographs.rglob("*.jpg"))]
        for name in NETWORKS:
            folder = Path(scratch) / name
            folder.mkdir()
            export_model(build_model(name), folder)
            found, said = program_rows(name, FixedMix(folder), runs)
            rows += found
            notes += said
        rows.append(_decoding(files, runs))
        found, said = _served(Path(scratch), files, runs, threads)
    return [*rows, *found], [*notes, *said]


def _decoding(files: list[bytes], runs: int) -> Row:
    from jobs.benchmarks.inference_sides import decode_as_needed, decode_everything

    name = "decoding and crops, one thread, against whole decodes and all crops"
    return compare(name, "images/s", lambda: decode_as_needed(files), lambda: decode_everything(files), runs)


def _served(scratch: Path, files: list[bytes], runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Over HTTP against the same classifier in this process, from JPEG bytes."""
    from jobs.benchmarks.inference_sides import build_model, classifier_rate
    from jobs.benchmarks.served import NUM_CLIENTS, REQUESTS, Server
    from pipeline.tracking.package import save_pyfunc

    folder = scratch / "registered"
    save_pyfunc(build_model(SERVED), folder)
    name = f"{SERVED} over HTTP, {NUM_CLIENTS} clients of one image a request, against no HTTP"
    classifier = classifier_rate(folder / "artifacts" / "drnet", files * PASSES)
    with classifier as alone, Server(folder, files, threads) as server:
        server.measure()
        server.latencies.clear()
        row = compare(name, "images/s", server.measure, alone, runs)
    return [row], [f"over HTTP: {runs} x {REQUESTS:,} requests, {server.num_errors} errors; {server.summary()}"]
