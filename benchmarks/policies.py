"""Measure the accuracy of each kind of policy at rising cost, over many splits of a finished run's validation images.

`python -m benchmarks.policies runs/glyphs`: policies are fitted on a random half and applied to the other half. It
prints the means over all splits, and how often an allowed drop of accuracy is exceeded on the held-out images.

Then the images are split into three parts, many times: a budget chooses a policy on one half of them, a quarter gives
the reported cost and accuracy with its interval, and the last, unseen quarter shows whether both hold.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.runs import images_of
from pipeline.config.run_folder import RunFolder
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.statistics import Estimate, accuracy
from pipeline.models.cost import Costs, measure_costs
from pipeline.policies.calibrate import ALL, Budget, Split, calibrate, cheaper, choose
from pipeline.policies.fit import KINDS, fit_fronts
from pipeline.policies.route import Images, route
from pipeline.training.checkpoint import load_model

SPLITS, DROP_SPLITS = 20, 200
SHARES = (0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
"""The cost limits, as shares of the largest resolution's cost."""
UNSEEN_SHARES, ENDS = (0.25, 0.3, 0.35, 0.4, 0.6), (0.05, 0.95)


def reached(images: Images, costs: Sequence[float]) -> dict[tuple[str, float], tuple[float, float]]:
    """Return (kind, cost limit) -> mean accuracy and cost on the held-out images, over SPLITS halves."""
    found = defaultdict(list)
    for seed in range(SPLITS):
        fitted_N = np.random.default_rng(seed).random(len(images)) < 0.5
        fronts, others = fit_fronts(images.rows(fitted_N)), images.rows(~fitted_N)
        for kind, cost in product(KINDS, costs):
            point = cheaper(fronts[kind], cost)
            if point is not None:
                routed = route(point.policy, others)
                found[kind, cost].append(
                    (routed.correct_N(others.correct_NR).mean(), routed.cost_N(images.costs).mean())
                )
    return {case: tuple(np.mean(pairs, axis=0).tolist()) for case, pairs in found.items()}


def exceeded(images: Images, drop: float) -> tuple[float, float]:
    """Return the shares of DROP_SPLITS splits in which the policy loses more than allowed, compared with the resolution
    that is best on the images that it was fitted on.

    The first share is about the held-out images, so it includes the chance of a small sample. The second is about all
    images.
    """
    held_out, everywhere = 0, 0
    for seed in range(DROP_SPLITS):
        keys_N = np.random.default_rng(seed).integers(2**63, size=len(images)).astype(np.uint64)
        found = calibrate(images, keys_N, Budget(max_drop=drop), Split(cross_fit_below=0))
        best = np.delete(images.correct_NR, found.held_out, axis=0).mean(axis=0).argmax()
        correct_NR = images.correct_NR[found.held_out]
        held_out += correct_NR[:, best].mean() - found.routed[ALL].correct_N(correct_NR).mean() > drop
        routed = route(found.chosen.policy, images)
        everywhere += images.correct_NR[:, best].mean() - routed.correct_N(images.correct_NR).mean() > drop
    return held_out / DROP_SPLITS, everywhere / DROP_SPLITS


def unseen(images: Images, costs: Sequence[float]) -> list[str]:
    """Return the lines of a table that shows how the cost and accuracy of a budget's policy hold on unseen images."""
    found = defaultdict(list)
    for seed in range(DROP_SPLITS):
        part_N = np.random.default_rng(seed).choice(3, size=len(images), p=(0.5, 0.25, 0.25))
        fitted, *others = (images.rows(np.flatnonzero(part_N == part)) for part in range(3))
        points = fit_fronts(fitted)[ALL]
        for cost in costs:
            point = choose(points, Budget(cost=cost), fitted)
            routed = [route(point.policy, part) for part in others]
            spent = [part.cost_N(images.costs).mean() for part in routed]
            correct = [part.correct_N(rows.correct_NR) for part, rows in zip(routed, others, strict=True)]
            reached = [accuracy(int(correct_N.sum()), len(correct_N)) for correct_N in correct]
            found[cost].append((spent[1] / cost - 1, spent[1] / spent[0] - 1, agree(*reached)))
    lines = [f"{'budget':<14}{'unseen cost over budget':>34}{'over the stated cost':>34}{'intervals agree':>18}"]
    for cost, rows in found.items():
        *errors, agreed = np.asarray(rows).T
        cells = [
            f"{values.mean():+.1%} ({' to '.join(f'{end:+.1%}' for end in np.quantile(values, ENDS))})"
            for values in errors
        ]
        lines.append(f"{1000 * cost:<14.2f}{cells[0]:>34}{cells[1]:>34}{agreed.mean():>18.1%}")
    return lines


def unseen_limits(costs: Costs) -> list[float]:
    """Return the cost limits for `unseen`, without those below the cheapest resolution, which no policy meets."""
    limits = [share * max(costs.backbone) for share in UNSEEN_SHARES]
    return [limit for limit in limits if limit >= min(costs.backbone)]


def agree(first: Estimate, second: Estimate) -> bool:
    """Return whether Newcombe's interval (1998) of the difference of two accuracies on different images contains 0.

    This is so in 95 % of splits if each accuracy's own interval covers the true value in 95 %.
    """
    lower, upper = sorted((first, second), key=lambda estimate: estimate.value)
    return bool(upper.value - lower.value <= np.hypot(upper.value - upper.low, lower.high - lower.value))


def table(images: Images) -> list[str]:
    """Return the lines of a table with accuracy and cost of the best policy of each kind within rising cost limits."""
    kinds = [kind for kind in KINDS if kind != "static"]
    costs = [share * max(images.costs.backbone) for share in SHARES]
    means = reached(images, costs)
    lines = [f"{'highest cost':<14}" + "".join(f"{kind:>24}" for kind in kinds)]
    for cost in costs:
        cells = [means.get((kind, cost), (np.nan, np.nan)) for kind in kinds]
        texts = "".join(f"{f'{100 * accuracy:.2f} % at {1000 * mean:.2f}':>24}" for accuracy, mean in cells)
        lines.append(f"{1000 * cost:<14.2f}{texts}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    for folder in parser.parse_args().runs:
        run = RunFolder(folder)
        if not run.predictions.exists():
            raise SystemExit(f"{folder} is not a finished run with a report: {run.predictions} is missing")
        models = {"the kept model": (run.predictions, run.model)}
        if run.predictions_before_joint.exists():
            models["before the joint stage"] = (run.predictions_before_joint, run.before_joint)
        for name, (predictions, model) in models.items():
            costs = measure_costs(load_model(model).model)
            images = images_of(Predictions.load(predictions), costs)
            statics = zip(costs.resolutions, images.correct_NR.mean(axis=0), costs.backbone, strict=True)
            print(f"{folder}, {name}: {len(images):,} images; costs in 1e-3 GFLOPs, predictor included")
            print(
                "static: "
                + ", ".join(f"{side} px {100 * top1:.2f} % at {1000 * cost:.2f}" for side, top1, cost in statics)
            )
            print("\n".join(table(images)))
            print(f"on images that nothing was chosen on, means and 90 % of {DROP_SPLITS} splits:")
            print("\n".join(unseen(images, unseen_limits(costs))))
            held_out, everywhere = exceeded(images, 0.01)
            print(
                f"a drop of 1 point is exceeded on the held-out images in {100 * held_out:.1f} %, and on all images in "
                f"{100 * everywhere:.1f} % of {DROP_SPLITS} splits\n"
            )


if __name__ == "__main__":
    main()
