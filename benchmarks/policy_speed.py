"""Measure the policies of a finished run at one accuracy: time of a batch, and images per second from JPEG bytes.

    python -m benchmarks.policy_speed --run runs/glyphs --data data/glyphs

It takes the cheapest policy of each kind within --drop points of the best static resolution, by expected accuracy on
the images that policies are fitted on. The last passes of a cascade are also timed alone; the difference is the cost of
its extra passes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import MIN_RUNS, Row, paired, show
from benchmarks.runs import images_of
from datasets.beton import VALIDATION, beton_path, read_jpeg, split_keys
from datasets.loading.loader import CenterCrop, MultiResolutionLoader
from pipeline.config.run_folder import RunFolder
from pipeline.evaluation.predictions import Predictions
from pipeline.models.cost import measure_costs
from pipeline.policies.calibrate import Split
from pipeline.policies.fit import KINDS, FittedPolicy, fit_fronts
from pipeline.policies.route import route
from pipeline.serving.export import export_model
from pipeline.serving.runtime import Classifier, RoutedNetwork
from pipeline.serving.runtime.policy import Policy
from pipeline.training.checkpoint import LoadedModel, load_model

BATCHES = (1, 64)
MAX_CALLS, MAX_SECONDS = 256, 30.0
"""The number of timed batches, and the seconds after which no further batch starts. The images repeat."""


def at_one_accuracy(fronts: Mapping[str, list[FittedPolicy]], drop: float) -> dict[str, FittedPolicy]:
    """Return the cheapest policy of each kind that is at most `drop` less accurate than the best static resolution."""
    lowest = fronts["static"][-1].accuracy - drop
    found = {kind: [point for point in fronts[kind] if point.accuracy >= lowest] for kind in KINDS}
    return {kind: points[0] for kind, points in found.items() if points}


def batch_times(
    network: RoutedNetwork, crops: Mapping[int, Tensor], policies: Mapping[str, Policy], batch: int
) -> dict[str, np.ndarray]:
    """Return the milliseconds per image of up to MAX_CALLS batches, measured in turns, by kind.

    `last passes` are those of the cascade, without the passes before them.
    """
    N = len(next(iter(crops.values())))
    last_N = network.classify(crops, policies["cascade"]).choice_N

    def last_passes(part: Mapping[int, Tensor], rows: Tensor) -> None:
        for index in last_N[rows].unique().tolist():
            network.logits(index, part[network.resolutions[index]][last_N[rows] == index])

    times: dict[str, list[float]] = {kind: [] for kind in (*policies, "last passes")}
    until = perf_counter() + MAX_SECONDS
    for call in range(MAX_CALLS + 1):
        if call > 1 and perf_counter() > until:
            break
        rows = (torch.arange(batch) + call * batch) % N
        part = {side: images[rows] for side, images in crops.items()}
        for kind in times:
            started = perf_counter()
            last_passes(part, rows) if kind == "last passes" else network.classify(part, policies[kind])
            times[kind].append(1e3 * (perf_counter() - started) / batch)
    return {kind: np.array(found[1:]) for kind, found in times.items()}  # the first call is a warm-up


def validation_crops(loaded: LoadedModel, beton: Path, count: int) -> dict[int, Tensor]:
    """Return the first images of the validation set at every side."""
    crop = CenterCrop(loaded.validation_crop)
    with closing(MultiResolutionLoader(beton, loaded.model.sides, count, crop=crop, shuffle=False)) as loader:
        batch = next(iter(loader.epoch(0)))
        return {side: torch.as_tensor(images).clone() for side, images in batch.images.items()}


def measure(
    run: RunFolder, data: Path, drop: float, runs: int, threads: int, max_files: int | None
) -> tuple[list[Row], list[str]]:
    """Return rows of images per second against the predictor's policy, and notes with latencies and agreement."""
    torch.set_num_threads(threads)
    loaded, predictions = load_model(run.model), Predictions.load(run.predictions)
    costs, beton = measure_costs(loaded.model), beton_path(data, VALIDATION)
    images = images_of(predictions, costs)
    keys_N = split_keys(data)[predictions.indices_N]
    select_N, _ = Split(cross_fit_below=0).parts(keys_N)[0]
    points = at_one_accuracy(fit_fronts(images.rows(select_N)), drop)
    policies = {kind: point.policy for kind, point in points.items()}
    files = [read_jpeg(beton, int(index)) for index in predictions.indices_N[:max_files]]
    notes = [
        f"{kind}: expected accuracy {point.accuracy:.2%} at {1000 * point.cost:.3g} MFLOPs, resolutions "
        f"{', '.join(str(costs.resolutions[index]) for index in point.policy.members)}"
        for kind, point in points.items()
    ]
    with TemporaryDirectory(prefix="policy-speed-") as folder:
        export_model(loaded, Path(folder))
        network = RoutedNetwork(Path(folder))
        crops = validation_crops(loaded, beton, max(BATCHES) * 4)
        for batch in BATCHES:
            for kind, times in batch_times(network, crops, policies, batch).items():
                p50, p95, p99 = np.percentile(times, (50, 95, 99))
                notes.append(f"batch {batch}, {kind}: {p50:.3g}/{p95:.3g}/{p99:.3g} ms an image (p50/p95/p99)")
        with closing(Classifier(network)) as classifier:
            rates = {kind: partial(_rate, classifier, files, policy) for kind, policy in policies.items()}
            first = {kind: rate() for kind, rate in rates.items()}  # a warm-up that also gives the classes
            turns = [{kind: rate()[0] for kind, rate in rates.items()} for _ in range(runs)]
    for kind, (_, classes_N) in first.items():
        expected_N = predictions.classes_NR[np.arange(len(images)), route(policies[kind], images).last_N]
        share = np.mean(classes_N == expected_N[: len(files)])
        notes.append(f"{kind} from JPEG bytes: {share:.2%} the same class as evaluation")
    rows = [
        paired(f"{kind}, against predictor", "images/s", [(turn[kind], turn["predictor"]) for turn in turns])
        for kind in policies
        if kind != "predictor"
    ]
    return rows, notes


def _rate(classifier: Classifier, files: list[bytes], policy: Policy) -> tuple[float, np.ndarray]:
    """Return the images/s, and the class of each image."""
    started = perf_counter()
    answers = list(classifier.classify(files, policy))
    rate = len(files) / (perf_counter() - started)
    return rate, np.array([-1 if answer.class_index is None else answer.class_index for answer in answers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="a finished run with a predictor")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="its prepared data")
    parser.add_argument("--drop", type=float, default=1.0, help="points below the best static resolution (default 1)")
    parser.add_argument("--runs", type=int, default=MIN_RUNS, help=f"measurements in turns (default {MIN_RUNS})")
    parser.add_argument("--threads", type=int, default=2, help="threads of a pass (default 2)")
    parser.add_argument("--images", type=int, help="images that are classified from JPEG bytes (default all)")
    args = parser.parse_args()
    rows, notes = measure(RunFolder(args.run), args.data, args.drop / 100, args.runs, args.threads, args.images)
    show("policy_speed", rows, notes, as_json=False)


if __name__ == "__main__":
    main()
