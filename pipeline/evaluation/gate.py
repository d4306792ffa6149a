"""Whether one model may take another's place: both on the same images, paired, and what each costs."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.files import whole_file
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.statistics import CONFIDENCE, Estimate, mcnemar_p, paired_difference
from pipeline.evaluation.tables import gflops, p_value, percent

FORMAT = 1
NOT_WORSE_MARGIN = 1.0
"""points of top-1 that the interval must exclude losing where the user names no bound"""
_ARRAYS = ("indices_N", "right_N")


@dataclass(frozen=True, eq=False)
class Answers:
    """Which of the N validation images a model as deployed gets right, and what it costs.

    Args:
        data_digest: of the prepared data that the images are of.
        indices_N: each image's position in the validation beton, int64, ascending.
        right_N: whether the answer at the chosen resolution is right, bool.
        mean_gflops: mean cost of an image, predictor included.
    """

    data_digest: str
    indices_N: np.ndarray
    right_N: np.ndarray
    mean_gflops: float

    @classmethod
    def of(cls, predictions: Predictions, data_digest: str, mean_gflops: float) -> Answers:
        right_N = predictions.correct_NR[np.arange(predictions.num_images), predictions.chosen_N]
        order_N = np.argsort(predictions.indices_N)
        return cls(data_digest, predictions.indices_N[order_N], right_N[order_N], mean_gflops)

    @property
    def top1(self) -> float:
        return float(self.right_N.mean())

    def save(self, path: Path) -> None:
        """Write one compressed .npz file, atomically: about a byte an image."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {"format": np.int64(FORMAT), "mean_gflops": np.float64(self.mean_gflops)}
        with whole_file(path) as file:
            np.savez_compressed(file, allow_pickle=False, data_digest=np.str_(self.data_digest), **arrays)

    @classmethod
    def load(cls, path: Path) -> Answers:
        """Read what `save` wrote; raises ValueError where it is not a whole file of this format."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                if (found := int(file["format"])) != FORMAT:
                    raise ValueError(f"its format is {found}, this version reads {FORMAT}")
                return cls(str(file["data_digest"]), *(file[name] for name in _ARRAYS), float(file["mean_gflops"]))
        except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} does not hold a model's answers: {error}") from error


@dataclass(frozen=True)
class Bounds:
    """What a challenger may be worse by.

    Raises:
        ValueError: a bound is negative, infinite or NaN.
    """

    max_accuracy_drop: float | None = None
    """points of top-1; None asks for "not worse", see `objections`"""
    max_gflops_increase: float = 0.0
    """percent of the champion's mean cost"""

    def __post_init__(self) -> None:
        for name in ("max_accuracy_drop", "max_gflops_increase"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < np.inf:
                raise ValueError(f"{name} is {value:g}; give a number from 0 on, such as 0.5")


@dataclass(frozen=True)
class Comparison:
    """A challenger against the champion on the same N images; accuracies are fractions of 1."""

    num_images: int
    challenger_top1: float
    champion_top1: float
    only_challenger: int
    """images that it alone gets right"""
    only_champion: int
    difference: Estimate
    """challenger minus champion, with Bonett and Price's 95 % interval"""
    mcnemar_p: float
    """exact, two-sided"""
    challenger_gflops: float
    champion_gflops: float

    @property
    def gflops_increase(self) -> float:
        """Of the challenger over the champion, percent."""
        return 100 * (self.challenger_gflops / self.champion_gflops - 1)

    def sentence(self) -> str:
        """The comparison in one line."""
        return (
            f"{points(self.difference)} of top-1 on {self.num_images:,} images (McNemar p "
            f"{_equals(self.mcnemar_p)}), {self.gflops_increase:+.1f} % GFLOPs"
        )


def compare_answers(challenger: Answers, champion: Answers) -> Comparison:
    """Pair two models' answers.

    Raises:
        ValueError: they are not of the same validation images.
    """
    if challenger.data_digest != champion.data_digest:
        raise ValueError(
            f"they were evaluated on other data (digest {challenger.data_digest} and {champion.data_digest}), so "
            "their accuracies cannot be compared"
        )
    if not np.array_equal(challenger.indices_N, champion.indices_N):
        raise ValueError(
            f"they were evaluated on other images of the same data ({len(challenger.indices_N):,} and "
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


def objections(found: Comparison, bounds: Bounds) -> list[str]:
    """What speaks against the challenger, a sentence each; nothing where it may take the champion's place.

    Not worse, where no `max_accuracy_drop` is given, is two things. McNemar's test does not find it less accurate, at
    5 %. And the images are enough to tell: the interval of the paired difference excludes a loss of more than
    NOT_WORSE_MARGIN points, for with ten images no test finds anything. With a bound it is the second thing alone, for
    that bound: a loss that is proven but within what the user accepts is no objection.
    """
    said = []
    low, margin = 100 * found.difference.low, bounds.max_accuracy_drop
    significant = found.difference.value < 0 and found.mcnemar_p < 1 - CONFIDENCE
    if margin is None and significant:
        said.append(
            f"it is less accurate: {points(found.difference)}, McNemar p {_equals(found.mcnemar_p)}; "
            "--max-accuracy-drop POINTS accepts a loss"
        )
    elif low < -(NOT_WORSE_MARGIN if margin is None else margin):
        allowed = NOT_WORSE_MARGIN if margin is None else margin
        said.append(
            f"a loss of more than {allowed:g} points is not excluded: {points(found.difference)} on "
            f"{found.num_images:,} images; more validation images narrow the interval, --max-accuracy-drop POINTS "
            "accepts more"
        )
    if found.gflops_increase > bounds.max_gflops_increase + 1e-6:
        said.append(
            f"it costs {found.gflops_increase:.3g} % more GFLOPs, and {bounds.max_gflops_increase:g} % more is "
            "allowed; --max-gflops-increase PERCENT accepts more"
        )
    return said


def comparison_table(found: Comparison, challenger: str, champion: str) -> str:
    """Both models and their difference, in aligned columns; the names head them."""
    rows: list[Sequence[str]] = [
        ("", champion, challenger, "difference"),
        (
            "top-1",
            percent(found.champion_top1, 2),
            percent(found.challenger_top1, 2),
            points(found.difference),
        ),
        (
            "right alone",
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
    """A difference of accuracies in points, with its interval."""
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.value:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"


def _equals(p: float) -> str:
    said = p_value(p)
    return said if said.startswith("<") else f"= {said}"
