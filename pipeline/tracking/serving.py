"""The registered model: image bytes in; class, probability, chosen resolution and cost out.

MLflow stores this very file with the model and runs it where the model is loaded, so it imports nothing of this
project. Beside it lie exported programs and a description, no pickle. It runs on the CPU.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow warns of its own type hints
    import mlflow.pyfunc

FOLDER_ARTIFACT = "drnet"
META_FILE, PREDICTOR_FILE, BACKBONE_FILE = "meta.json", "predictor.pt2", "backbone_{side}.pt2"
IMAGE_COLUMN = "image"
OUTPUT_COLUMNS = {
    "class_index": "Int64",
    "label": "string",
    "probability": "Float64",
    "resolution": "Int64",
    "gflops": "Float64",
    "error": "string",
}
IMAGE_FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 89_478_485
IMAGES_AT_ONCE = 64


class BadImageError(ValueError):
    """The bytes are not a sound image; the message is the reason."""


@dataclass(frozen=True)
class Routed:
    """What `RoutedNetwork.classify` finds for N images."""

    logits_NK: Tensor
    choice_N: Tensor
    """index of the resolution that each image was run at"""


class RoutedNetwork:
    """Exported programs of one predictor and of one backbone for each candidate resolution.

    Args:
        folder: holds meta.json, a backbone_SIDE.pt2 for each resolution and, for more than one, predictor.pt2.

    Raises:
        ValueError: a program holds a pickle, which could run anything when loaded.
    """

    def __init__(self, folder: Path):
        meta = json.loads((folder / META_FILE).read_text())
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        self.resolutions: tuple[int, ...] = tuple(meta["resolutions"])
        self.predictor_size: int = meta["predictor_size"]
        self.crop_fraction: float = meta["validation_crop"]
        self.gflops: tuple[float, ...] = tuple(cost + meta["predictor_gflops"] for cost in meta["backbone_gflops"])
        self._predictor = load_program(folder / PREDICTOR_FILE) if len(self.resolutions) > 1 else None
        self._backbones = [load_program(folder / BACKBONE_FILE.format(side=side)) for side in self.resolutions]

    @property
    def sides(self) -> tuple[int, ...]:
        """The image sides that `classify` needs, pixels."""
        predictor = [] if self._predictor is None else [self.predictor_size]
        return tuple(sorted({*self.resolutions, *predictor}, reverse=True))

    @torch.inference_mode()
    def classify(self, crops: Mapping[int, Tensor]) -> Routed:
        """Choose each image's resolution without noise, then run each group of equal choice once.

        Args:
            crops: side -> uint8 (N, side, side, 3), the same N images at each of `sides`.
        """
        choice_N = self._choose(crops)
        logits_NK = torch.empty(len(choice_N), len(self.classes))
        for index, side in enumerate(self.resolutions):
            group = (choice_N == index).nonzero().flatten()
            if len(group):
                logits_NK[group] = self._backbones[index](crops[side][group])
        return Routed(logits_NK, choice_N)

    def _choose(self, crops: Mapping[int, Tensor]) -> Tensor:
        """Index of the resolution for each image, int64 (N,); with one resolution there is nothing to predict."""
        if self._predictor is None:
            return torch.zeros(len(crops[self.resolutions[0]]), dtype=torch.int64)
        return self._predictor(crops[self.predictor_size]).argmax(dim=1)


class RoutedClassifier(mlflow.pyfunc.PythonModel):
    """A row for each image, in order; an image that cannot be read gets its reason in `error`."""

    def load_context(self, context: Any) -> None:
        self.network = RoutedNetwork(Path(context.artifacts[FOLDER_ARTIFACT]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Classify the files in column `image` (bytes of JPEG or PNG files).

        Returns:
            One row for each: class_index, label, probability in [0, 1], resolution in pixels, gflops (multiply-adds /
            1e9, predictor included) and error. An unreadable image has nothing but error and gflops 0.
        """
        files = model_input[IMAGE_COLUMN].tolist()
        rows = []
        for start in range(0, len(files), IMAGES_AT_ONCE):
            rows += self._rows(files[start : start + IMAGES_AT_ONCE])
        return pd.DataFrame(rows, columns=list(OUTPUT_COLUMNS)).astype(OUTPUT_COLUMNS)

    def _rows(self, files: Sequence[Any]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{} for _ in files]
        sound, crops = [], []
        for position, file in enumerate(files):
            try:
                crops.append(centre_crops(decode(file), self.network.sides, self.network.crop_fraction))
                sound.append(position)
            except BadImageError as error:
                rows[position] = {"gflops": 0.0, "error": str(error)}
        if sound:
            batch = {side: torch.from_numpy(np.stack([crop[side] for crop in crops])) for side in self.network.sides}
            for position, row in zip(sound, self._answers(self.network.classify(batch)), strict=True):
                rows[position] = row
        return rows

    def _answers(self, routed: Routed) -> list[dict[str, Any]]:
        probability_N, class_N = routed.logits_NK.softmax(dim=1).max(dim=1)
        return [
            {
                "class_index": index,
                "label": self.network.classes[index],
                "probability": probability,
                "resolution": self.network.resolutions[choice],
                "gflops": self.network.gflops[choice],
            }
            for index, probability, choice in zip(
                class_N.tolist(), probability_N.tolist(), routed.choice_N.tolist(), strict=True
            )
        ]


def load_program(path: Path) -> torch.nn.Module:
    """Load a `torch.export` program that holds no pickle, as a callable; raises ValueError for one that does."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.rpartition("/")[2]
            pickled = name.endswith(".pt") or name.startswith(("custom_obj", "opaque_obj"))
            if name.endswith("_config.json"):
                entries = json.loads(archive.read(member))["config"].values()
                pickled = any(entry["use_pickle"] for entry in entries)
            if pickled and member.file_size:
                raise ValueError(f"{path} holds pickled objects ({member.filename}), which this model never has")
    program = torch.export.load(path).module()
    program.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]  # torch's stubs lack it
    return program


def decode(file: Any) -> Image.Image:
    """The bytes of an image file as an upright RGB image.

    Greyscale and CMYK are converted, 16 bits are scaled to 8, alpha is composed over white: as in preparation.

    Raises:
        BadImageError: not bytes, no JPEG or PNG, truncated, damaged, or more than MAX_PIXELS pixels.
    """
    if not isinstance(file, bytes):
        raise BadImageError(f"the image is given as {type(file).__name__}, not as the bytes of a file")
    if not file:
        raise BadImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(file), formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImageError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except BadImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError(f"not a {' or '.join(IMAGE_FORMATS)} file") from None
    except Exception as error:  # a parser fed with arbitrary bytes fails in arbitrary ways
        raise BadImageError(str(error) or type(error).__name__) from None


def centre_crops(image: Image.Image, sides: Sequence[int], fraction: float) -> dict[int, np.ndarray]:
    """One centred square at several sides, as the validation images are cut: uint8 (side, side, 3) each.

    Args:
        fraction: side of the square, as a fraction of the image's shorter side.
    """
    extent = fraction * min(image.size)
    left, top = (image.width - extent) / 2, (image.height - extent) / 2
    box = (left, top, left + extent, top + extent)
    return {side: np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box)) for side in sides}


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        pixels_HW = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((pixels_HW + 128) // 257).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, colours)
    return image.convert("RGB")


mlflow.models.set_model(RoutedClassifier())
