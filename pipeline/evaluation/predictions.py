"""Collect, merge and store a model's logits for every validation image at every candidate resolution."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from datasets.files import whole_file
from pipeline.models.dry_run import training_mode

if TYPE_CHECKING:
    from pipeline.models.drnet import DRNet

FORMAT = 1
_ARRAYS = ("labels_N", "indices_N", "logits_NRK", "predictor_logits_NR", "shifted_classes_NV", "extents_N")
SHIFT = 1 / 16
"""The distance by which the crops of a placebo oracle are shifted, as a fraction of the crop's side."""
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))
"""The directions (down, right) of the shifts, in the order in which they are used."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """The backbone's logits of N images at R candidate resolutions over K classes, and the predictor's logits.

    Args:
        resolutions: sides of the candidates in pixels; the order of axis R.
        labels_N: true classes, int64 in [0, K).
        indices_N: position of each image in the validation beton, int64.
        logits_NRK: the backbone's logits at each resolution, float32, finite.
        predictor_logits_NR: the predictor's logits over the resolutions, float32, finite.
        shifted_classes_NV: predicted class of V shifted crops at the largest resolution (see `shifted`), int64; V is 0
            if none were run, as in files of earlier versions.
        extents_N: side of each image's center crop before it is resized, in pixels, float64; infinite if unknown, as in
            files of earlier versions.

    Raises:
        ValueError: shapes, dtypes or values do not match; the message lists all problems.
    """

    resolutions: tuple[int, ...]
    labels_N: np.ndarray
    indices_N: np.ndarray
    logits_NRK: np.ndarray
    predictor_logits_NR: np.ndarray
    shifted_classes_NV: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    extents_N: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if not self.shifted_classes_NV.size:
            object.__setattr__(self, "shifted_classes_NV", np.zeros((len(self.labels_N), 0), np.int64))
        if not self.extents_N.size:
            object.__setattr__(self, "extents_N", np.full(len(self.labels_N), np.inf))
        problems = list(self._problems())
        if problems:
            raise ValueError(f"the arrays of the predictions do not match: {'; '.join(problems)}")

    @property
    def num_images(self) -> int:
        """The number of images, N."""
        return len(self.labels_N)

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return self.logits_NRK.shape[2]

    @cached_property
    def classes_NR(self) -> np.ndarray:
        """The class that the backbone predicts at each resolution, int64."""
        return self.logits_NRK.argmax(axis=2)

    @cached_property
    def correct_NR(self) -> np.ndarray:
        """Whether the answer at each resolution is correct, bool."""
        return self.classes_NR == self.labels_N[:, None]

    @cached_property
    def shifted_correct_NV(self) -> np.ndarray:
        """Whether the prediction for each shifted crop is correct, bool."""
        return self.shifted_classes_NV == self.labels_N[:, None]

    @cached_property
    def chosen_N(self) -> np.ndarray:
        """The index of the resolution that the predictor chooses (argmax, without noise), int64."""
        return self.predictor_logits_NR.argmax(axis=1)

    def rows(self, rows_M: np.ndarray) -> Predictions:
        """Return the images at the given rows, in that order."""
        return Predictions(self.resolutions, *(getattr(self, name)[rows_M] for name in _ARRAYS))

    def save(self, path: Path) -> None:
        """Write one .npz file atomically."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        with whole_file(path) as file:
            np.savez(file, format=np.int64(FORMAT), resolutions=np.asarray(self.resolutions), **arrays)

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read a file that `save` wrote.

        Raises:
            OSError: the file cannot be opened.
            ValueError: the file is incomplete or of another format.
        """
        try:
            # Open the file here, because np.load does not close a file that is not a complete archive.
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                if (found := int(file["format"])) != FORMAT:
                    raise ValueError(f"its format is {found}; this version reads format {FORMAT}")
                return cls(
                    tuple(file["resolutions"].tolist()), **{name: file[name] for name in _ARRAYS if name in file}
                )
        except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a predictions file: {error}; run jobs.evaluate again") from error

    def _problems(self) -> Iterator[str]:
        """Yield what is wrong, shapes first, because the later checks need correct shapes."""
        N, R = len(self.labels_N), len(self.resolutions)
        if R == 0:
            yield "there are no resolutions"
        if self.logits_NRK.ndim != 3:
            yield f"logits have shape {self.logits_NRK.shape}, expected (N, R, K)"
            return
        K = self.logits_NRK.shape[2]
        expected = {
            "labels_N": ((N,), np.int64),
            "indices_N": ((N,), np.int64),
            "logits_NRK": ((N, R, K), np.float32),
            "predictor_logits_NR": ((N, R), np.float32),
            "shifted_classes_NV": ((N, self.shifted_classes_NV.shape[-1]), np.int64),
            "extents_N": ((N,), np.float64),
        }
        for name, (shape, dtype) in expected.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype:
                yield f"{name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}"
        if N and self.labels_N.dtype == np.int64 and not 0 <= self.labels_N.min() <= self.labels_N.max() < K:
            yield f"labels range from {self.labels_N.min()} to {self.labels_N.max()}, expected 0 to {K - 1}"
        for name in ("logits_NRK", "predictor_logits_NR"):
            array = getattr(self, name)
            # Minimum and maximum are NaN if any value is. They need no temporary array as large as the logits.
            if array.size and not np.isfinite([array.min(), array.max()]).all():
                rows = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
                yield f"{name} is NaN or infinite for {len(rows)} images, the first at index {self.indices_N[rows[0]]}"


def collect_predictions(
    model: DRNet,
    batches: Iterable,
    backbone_logits: Callable[[Tensor], Tensor] | None = None,
    placebo: bool = False,
) -> Predictions:
    """Run every image at every resolution and through the predictor, in eval mode and without gradients.

    Restores each layer's training flag, and skips empty batches. Without any image, the result has N = 0 and K = 1, and
    `merge` ignores it.

    Args:
        batches: batches with `images` (maps a side to uint8 (n, side, side, 3)), `labels` and `indices` (n,), on any
            device.
        backbone_logits: function from indices (n,) to known backbone logits (n, R, K). If given, the backbone does not
            run, and `images` needs only the predictor's input.
        placebo: also run R - 1 shifted crops at the largest resolution, so that an oracle over resolutions can be
            compared with an oracle over equally many crops at one resolution. This costs R - 1 passes at the largest
            resolution.
    """
    device, R = next(model.parameters()).device, len(model.resolutions)
    labels, indices, logits, predictor, shifted_answers = [], [], [], [], []
    largest = int(np.argmax(model.resolutions))
    with training_mode(model, False), torch.inference_mode():
        for batch in batches:
            if len(batch.labels) == 0:
                continue
            images = {side: pixels.to(device, non_blocking=True) for side, pixels in batch.images.items()}
            if backbone_logits is None:
                static = [model.static_logits(images, index) for index in range(len(model.resolutions))]
                logits_NRK = torch.stack(static, dim=1)
            else:
                logits_NRK = backbone_logits(batch.indices)
            logits.append(logits_NRK.float().cpu().numpy())
            predictor.append(model.predictor_logits(images).float().cpu().numpy())
            shifted_answers.append(np.zeros((len(batch.labels), 0), np.int64))
            for direction in DIRECTIONS[: R - 1] if placebo else ():
                moved = images | {model.resolutions[largest]: shifted(images[model.resolutions[largest]], *direction)}
                answers_N = model.static_logits(moved, largest).argmax(dim=1).cpu().numpy()
                shifted_answers[-1] = np.column_stack([shifted_answers[-1], answers_N])
            # Copy the arrays, because the loader may reuse the batch's memory.
            labels.append(batch.labels.cpu().numpy().astype(np.int64))
            indices.append(batch.indices.cpu().numpy().astype(np.int64))
    if not labels:
        labels, indices = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        logits, predictor = [np.zeros((0, R, 1), np.float32)], [np.zeros((0, R), np.float32)]
        shifted_answers = [np.zeros((0, 0), np.int64)]
    arrays = (np.concatenate(parts) for parts in (labels, indices, logits, predictor, shifted_answers))
    return Predictions(tuple(model.resolutions), *arrays)


def shifted(pixels_NHWC: Tensor, down: int, right: int) -> Tensor:
    """Shift crops by SHIFT of their side. The edge that comes into view repeats the last row or column.

    Mirror images are not used for this, because not every object keeps its class when it is mirrored.
    """
    side = pixels_NHWC.shape[1]
    step, places = max(1, round(SHIFT * side)), torch.arange(side, device=pixels_NHWC.device)
    rows_H, columns_W = ((places - step * sign).clamp(0, side - 1) for sign in (down, right))
    return pixels_NHWC[:, rows_H][:, :, columns_W]


def merge(parts: Sequence[Predictions], num_images: int | None = None) -> Predictions:
    """Merge the predictions of all ranks, sorted by index.

    Args:
        num_images: size of the validation set; None derives it from the largest index.

    Raises:
        ValueError: the parts are from different models, or an image is missing or occurs twice.
    """
    filled = [part for part in parts if part.num_images]
    if not filled:
        raise ValueError("there are no predictions to merge: every part is empty")
    kinds = sorted({(part.resolutions, part.num_classes) for part in filled})
    if len(kinds) > 1:
        listing = ", ".join(f"{list(resolutions)} px with {K} classes" for resolutions, K in kinds)
        raise ValueError(f"predictions of different models cannot be merged: {listing}")
    indices_N = np.concatenate([part.indices_N for part in filled])
    _check_complete(indices_N, num_images)
    order_N = np.argsort(indices_N)
    joined = (np.concatenate([getattr(part, name) for part in filled])[order_N] for name in _ARRAYS)
    return Predictions(filled[0].resolutions, *joined)


def _check_complete(indices_N: np.ndarray, num_images: int | None) -> None:
    count = int(indices_N.max()) + 1 if num_images is None else num_images
    outside = indices_N[(indices_N < 0) | (indices_N >= count)]
    if len(outside):
        raise ValueError(f"predictions contain image {outside[0]}, but the validation set has indices 0 to {count - 1}")
    times = np.bincount(indices_N, minlength=count)
    for found, what in ((times > 1, "predicted more than once"), (times == 0, "missing")):
        if found.any():
            first = ", ".join(str(index) for index in np.flatnonzero(found)[:5])
            raise ValueError(f"{found.sum()} of {count} images are {what}, the first: {first}; run jobs.evaluate again")
