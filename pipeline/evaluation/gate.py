"""Decide whether one model may replace another, by a paired comparison on the same images and by cost."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from datasets.files import whole_file
from pipeline.evaluation.statistics import CONFIDENCE, Estimate, mcnemar_p, paired_difference
from pipeline.evaluation.tables import gflops, p_value, percent
from pipeline.policies.calibrate import drop_bound

FORMAT = 1
ANSWERS_FILE = "answers.npz"
"""The file beside a report or a registered model: which held-out images its policy classifies correctly."""
NOT_WORSE_MARGIN = 1.0
"""The loss, in points of top-1, that the interval must exclude if the user gives no bound."""
_ARRAYS = ("indices_N", "right_N", "static_right_NR", "static_gflops_R")


@dataclass(frozen=True, eq=False)
class Answers:
    """Which of the N validation images a deployed model classifies correctly, and its mean cost.

    Args:
        data_digest: digest of the prepared data that contains the images.
        indices_N: position of each image in the validation beton, int64, ascending.
        right_N: whether the answer of the deployed policy is correct, bool.
        mean_gflops: mean GFLOPs per image, including the predictor.
        static_right_NR: whether each of the model's own resolutions is correct, bool; None in files of earlier
            versions.
        static_gflops_R: GFLOPs per image at each resolution.
    """

    data_digest: str
    indices_N: np.ndarray
    right_N: np.ndarray
    mean_gflops: float
    static_right_NR: np.ndarray | None = None
    static_gflops_R: np.ndarray | None = None

    @property
    def top1(self) -> float:
        """The share of correct answers, 0 to 1."""
        return float(self.right_N.mean())

    def save(self, path: Path) -> None:
        """Write one compressed .npz file atomically; it takes a few bytes per image."""
        arrays = {name: found for name in _ARRAYS if (found := getattr(self, name)) is not None}
        arrays |= {"format": np.int64(FORMAT), "mean_gflops": np.float64(self.mean_gflops)}
        with whole_file(path) as file:
            np.savez_compressed(file, allow_pickle=False, data_digest=np.str_(self.data_digest), **arrays)

    @classmethod
    def load(cls, path: Path) -> Answers:
        """Read a file that `save` wrote. Raise ValueError if it is incomplete or of another format."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                if (found := int(file["format"])) != FORMAT:
                    raise ValueError(f"its format is {found}; this version reads format {FORMAT}")
                arrays = {name: file[name] for name in _ARRAYS if name in file}
                return cls(data_digest=str(file["data_digest"]), mean_gflops=float(file["mean_gflops"]), **arrays)
        except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a file of model answers: {error}") from error


@dataclass(frozen=True)
class Bounds:
    """Limits of how much worse than the champion a challenger may be.

    Raises:
        ValueError: a bound is negative, infinite or NaN.
    """

    max_accuracy_drop: float | None = None
    """The largest accepted loss in points of top-1; None requires "not worse" (see `objections`)."""
    max_gflops_increase: float = 0.0
    """The largest accepted increase of the mean GFLOPs, in percent of the champion's."""

    def __post_init__(self) -> None:
        for name in ("max_accuracy_drop", "max_gflops_increase"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < np.inf:
                raise ValueError(f"{name} is {value:g}; give a number of 0 or more, such as 0.5")


@dataclass(frozen=True)
class Comparison:
    """The comparison of a challenger with the champion on the same N images. Accuracies are fractions of 1."""

    num_images: int
    challenger_top1: float
    champion_top1: float
    only_challenger: int
    """The number of images that only the challenger classifies correctly."""
    only_champion: int
    """The number of images that only the champion classifies correctly."""
    difference: Estimate
    """Challenger minus champion, with the 95 % interval of Bonett and Price."""
    mcnemar_p: float
    """The exact two-sided p value of McNemar's test."""
    challenger_gflops: float
    champion_gflops: float

    @property
    def gflops_increase(self) -> float:
        """The increase from champion to challenger, in percent."""
        return 100 * (self.challenger_gflops / self.champion_gflops - 1)

    def sentence(self) -> str:
        """Return the comparison in one line."""
        return (
            f"{points(self.difference)} of top-1 on {self.num_images:,} images (McNemar p "
            f"{_equals(self.mcnemar_p)}), {self.gflops_increase:+.1f} % GFLOPs"
        )


def compare_answers(challenger: Answers, champion: Answers) -> Comparison:
    """Compare the answers of two models image by image.

    Raises:
        ValueError: the answers are for different validation images.
    """
    if challenger.data_digest != champion.data_digest:
        raise ValueError(
            f"they were evaluated on different data (digests {challenger.data_digest} and {champion.data_digest}), so "
            "their accuracies cannot be compared"
        )
    if not np.array_equal(challenger.indices_N, champion.indices_N):
        raise ValueError(
            f"they were evaluated on different images of the same data ({len(challenger.indices_N):,} and "
            f"{len(champion.indices_N):,}), so their accuracies cannot be compared"
        )
    only_challenger = int((challenger.right_N & ~champion.right_N).sum())
    only_champion = int((~challenger.right_N & champion.right_N).sum())
    return Comparison(
        num_images=len(challenger.right_N),
        challenger_top1=challenger.top1,
        champion_top1=champion.top1,
        only_challenger=only_challenger,
        only_champion=only_champion,
        difference=paired_difference(only_challenger, only_champion, len(challenger.right_N)),
        mcnemar_p=mcnemar_p(only_challenger, only_champion),
        challenger_gflops=challenger.mean_gflops,
        champion_gflops=champion.mean_gflops,
    )


def common_images(first: Answers, second: Answers) -> tuple[Answers, Answers]:
    """Return the answers of two models for the images on which both have results.

    Raises:
        ValueError: the answers are for different data, or they have no image in common.
    """
    if first.data_digest != second.data_digest:
        raise ValueError(
            f"they were evaluated on different data (digests {first.data_digest} and {second.data_digest}); train both "
            "on the same prepared data"
        )
    common = np.intersect1d(first.indices_N, second.indices_N)
    if len(common) == 0:
        raise ValueError("their reports have no image in common; give both runs the same policy.select_share")

    def among(answers: Answers) -> Answers:
        inside_N = np.isin(answers.indices_N, common)
        static_NR = answers.static_right_NR
        return replace(
            answers,
            indices_N=common,
            right_N=answers.right_N[inside_N],
            static_right_NR=None if static_NR is None else static_NR[inside_N],
        )

    return among(first), among(second)


def objections(found: Comparison, bounds: Bounds) -> list[str]:
    """Return the reasons to keep the champion, one sentence each; empty if the challenger may replace it.

    Without `max_accuracy_drop` the challenger must be "not worse", which has two conditions: McNemar's test does not
    find it less accurate at the 5 % level, and the interval of the paired difference excludes a loss of more than
    NOT_WORSE_MARGIN points (with ten images, McNemar's test does not even detect 5 lost ones). With `max_accuracy_drop`
    only the interval decides, against that bound: a proven loss that the user accepts is no objection. The gate
    compares top-1, also for runs with policy.select_by=balanced_accuracy.
    """
    reasons = list(_losses(found, bounds))
    if found.gflops_increase > bounds.max_gflops_increase + 1e-6:
        reasons.append(
            f"it costs {found.gflops_increase:.3g} % more GFLOPs, and {bounds.max_gflops_increase:g} % more is "
            "allowed; --max-gflops-increase PERCENT allows more"
        )
    return reasons


def _losses(found: Comparison, bounds: Bounds, other: str = "") -> Iterator[str]:
    """Yield the objection to a loss of accuracy. `other` names the other model if it is not the champion."""
    low, margin = 100 * found.difference.low, bounds.max_accuracy_drop
    if margin is None and found.difference.value < 0 and found.mcnemar_p < 1 - CONFIDENCE:
        yield (
            f"it is less accurate{other and f' than {other}'}: {points(found.difference)}, "
            f"McNemar p {_equals(found.mcnemar_p)}; "
            "--max-accuracy-drop POINTS accepts a loss"
        )
        return
    allowed = NOT_WORSE_MARGIN if margin is None else margin
    if low < -allowed:
        yield (
            f"it may lose more than {allowed:g} point{'' if allowed == 1 else 's'}{other and f' against {other}'}: "
            f"{points(found.difference)} on {found.num_images:,} images; more validation images narrow the interval, "
            "and --max-accuracy-drop POINTS accepts a larger loss"
        )


def former_objections(found: Comparison, bounds: Bounds, version: str) -> list[str]:
    """Return the objections to a loss against the best former champion, by the same rule as against the champion.

    Otherwise many successive challengers, each losing less than the gate can detect, could add up to any loss.
    """
    return list(_losses(found, bounds, f"version {version}, the best former champion"))


def static_objections(challenger: Answers, bounds: Bounds) -> list[str]:
    """Return the objection that one of the challenger's own static resolutions is cheaper and not less accurate.

    The one-sided bound must also exclude that the challenger is better by more than the accepted loss.
    """
    if challenger.static_right_NR is None or challenger.static_gflops_R is None:
        return []
    allowed = NOT_WORSE_MARGIN if bounds.max_accuracy_drop is None else bounds.max_accuracy_drop
    for index in np.argsort(challenger.static_gflops_R):
        static_N, cost = challenger.static_right_NR[:, index], float(challenger.static_gflops_R[index])
        if cost >= challenger.mean_gflops * (1 - 1e-6) or static_N.sum() < challenger.right_N.sum():
            continue
        if 100 * drop_bound(challenger.right_N, static_N) <= allowed:
            return [
                f"its own static resolution of {gflops(cost)} GFLOPs is at least as accurate "
                f"({percent(static_N.mean(), 2)} against {percent(challenger.top1, 2)}) and cheaper "
                f"({gflops(challenger.mean_gflops)} GFLOPs); choose another policy with jobs.calibrate, or "
                "train a static network"
            ]
    return []


def comparison_table(found: Comparison, challenger: str, champion: str) -> str:
    """Return a table of both models and their difference, with the models' names as headers."""
    rows: list[Sequence[str]] = [
        ("", champion, challenger, "difference"),
        (
            "top-1",
            percent(found.champion_top1, 2),
            percent(found.challenger_top1, 2),
            points(found.difference),
        ),
        (
            "only this one correct",
            f"{found.only_champion:,}",
            f"{found.only_challenger:,}",
            f"McNemar p {_equals(found.mcnemar_p)}",
        ),
        (
            "GFLOPs",
            gflops(found.champion_gflops),
            gflops(found.challenger_gflops),
            f"{found.gflops_increase:+.1f} %",
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {first:>{widths[1]}}  {second:>{widths[2]}}  {last}"
        for name, first, second, last in rows
    )


def points(difference: Estimate) -> str:
    """Format a difference of accuracies in percentage points, with its interval."""
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.value:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"


def _equals(p: float) -> str:
    said = p_value(p)
    return said if said.startswith("<") else f"= {said}"
