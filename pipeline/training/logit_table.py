"""The logit table: a frozen backbone's logits for crops of every sample, computed once and stored on disk."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.beton import TRAIN, Manifest
from datasets.files import exclusive, shown_bytes, write_whole
from pipeline.config.schema import Config
from pipeline.models.drnet import DRNet, validation_crop
from pipeline.training import distributed
from pipeline.training.run import Batches

FORMAT = 1
TABLE_FILE = "table.json"
CHUNK_SAMPLES = 1024
"""Samples per file. A killed process loses at most the work of one file per rank."""


class TableError(ValueError):
    """A logit table is missing, incomplete, damaged, or does not match the backbone and data."""


class UnfillableTableError(TableError):
    """A logit table cannot be computed. A retry would fail in the same way on every rank."""


@dataclass(frozen=True)
class TableKey:
    """Everything that the logits of a table depend on.

    Attributes:
        backbone: SHA-256 of the backbone's weights and statistics, and of the normalization of its input.
        data: digest of the prepared data's manifest.
        split: train or validation.
        crop: settings of the split's crop, and the loader's largest side, which decides the scale of JPEG decoding.
        resolutions: sides in pixels; axis R.
        num_classes: size of axis K.
        num_samples: number of samples in the split.
        precision: precision of the forward passes.
        chunk_samples: samples per file; the last file may have fewer.
    """

    backbone: str
    data: str
    split: str
    crop: Mapping[str, Any]
    resolutions: list[int]
    num_classes: int
    num_samples: int
    precision: str
    chunk_samples: int = CHUNK_SAMPLES

    @classmethod
    def of(cls, model: DRNet, config: Config, manifest: Manifest, split: str) -> TableKey:
        """Return the key of `model`'s logits for a split of the data that `config` loads.

        The validation split uses float32 and the center crop, like evaluation during training.
        """
        loader = config.loader
        augmentation = {
            "seed": config.seed,
            "scale": [*loader.crop_scale],
            "ratio": [*loader.crop_ratio],
            "flip": loader.flip,
        }
        crop = augmentation if split == TRAIN else {"centre": validation_crop(config)}
        return cls(
            backbone=backbone_digest(model),
            data=manifest.digest,
            split=split,
            crop=crop | {"decoded_for": max(model.sides)},
            resolutions=[*model.resolutions],
            num_classes=len(manifest.classes),
            num_samples=manifest.splits[split].count,
            precision=config.training.precision if split == TRAIN else "float32",
        )

    @property
    def content(self) -> dict[str, Any]:
        """Return the content of table.json."""
        return {"format": FORMAT, **asdict(self)}

    @property
    def digest(self) -> str:
        """The name of the table's folder: 32 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def num_chunks(self) -> int:
        """The number of files per epoch of crops."""
        return -(-self.num_samples // self.chunk_samples)

    @property
    def crop_bytes(self) -> int:
        """The bytes of one epoch of crops, without the file headers."""
        return logits_bytes(self.num_samples, len(self.resolutions), self.num_classes)

    def bounds(self, chunk: int) -> tuple[int, int]:
        """Return the index of a chunk's first sample, and one past the index of its last sample."""
        return chunk * self.chunk_samples, min((chunk + 1) * self.chunk_samples, self.num_samples)


def backbone_digest(model: DRNet) -> str:
    """Return a SHA-256 in hexadecimal of everything that turns images into class logits.

    The digest does not depend on the device or the memory format.
    """
    digest = hashlib.sha256()
    state = {"mean": model.mean, "std": model.std, **model.backbone.state_dict()}
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def logits_bytes(num_images: int, num_resolutions: int, num_classes: int) -> int:
    """Return the bytes of stored logits on disk."""
    return num_images * num_resolutions * num_classes * np.dtype(np.float16).itemsize


class LogitTable:
    """Read logits from a complete table.

    Args:
        root: folder of tables, either the one of `fill_table` or one to which the table's folder was copied.
        key: identifies the table.
        crop_epochs: epochs of crops that will be read.

    Raises:
        TableError: the table is incomplete, or none has this key; the message lists the differences to other tables.
    """

    def __init__(self, root: Path, key: TableKey, crop_epochs: Sequence[int]):
        self.key, self.folder = key, root / key.digest
        _check_key(root, key)
        self._crop_epochs = frozenset(crop_epochs)
        for crop_epoch in sorted(self._crop_epochs):
            self._check_complete(crop_epoch)
        self._mapped: tuple[int, dict[int, NDArray[np.float16]]] = (-1, {})

    def logits(self, crop_epoch: int, indices_N: Tensor) -> Tensor:
        """Return logits (N, R, K), float32 on the CPU, of samples with the crops of `crop_epoch`.

        The first read of a file verifies its checksum. Files stay memory-mapped until another `crop_epoch` is read.

        Raises:
            TableError: a file is missing or damaged.
            ValueError: the table was not opened for this epoch, or has no such sample.
        """
        indices = indices_N.cpu().numpy()
        if crop_epoch not in self._crop_epochs or (
            len(indices) and not 0 <= indices.min() <= indices.max() < self.key.num_samples
        ):
            raise ValueError(
                f"Crops of epoch {crop_epoch}, samples {indices[:5].tolist()}...: this table was opened for crops of "
                f"the epochs {sorted(self._crop_epochs)} and has samples 0 to {self.key.num_samples - 1}."
            )
        logits_NRK = np.empty((len(indices), len(self.key.resolutions), self.key.num_classes), np.float16)
        chunk_N, row_N = np.divmod(indices, self.key.chunk_samples)
        for chunk in np.unique(chunk_N).tolist():
            here_N = chunk_N == chunk
            logits_NRK[here_N] = self._chunk(crop_epoch, chunk)[row_N[here_N]]
        return torch.from_numpy(logits_NRK).float()

    def _chunk(self, crop_epoch: int, chunk: int) -> NDArray[np.float16]:
        # Keep only the chunks of one epoch of crops, because all chunks could exceed a process's limit of mappings.
        if self._mapped[0] != crop_epoch:
            self._mapped = (crop_epoch, {})
        chunks = self._mapped[1]
        if chunk not in chunks:
            chunks[chunk] = map_chunk(self.folder, self.key, crop_epoch, chunk)
        return chunks[chunk]

    def _check_complete(self, crop_epoch: int) -> None:
        folder = crop_folder(self.folder, crop_epoch)
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        expected = [chunk_path(self.folder, crop_epoch, chunk) for chunk in range(self.key.num_chunks)]
        missing = [path for path in expected if path.name not in found]
        if missing:
            raise TableError(
                f"The logit table in {self.folder} is incomplete: epoch {crop_epoch} lacks {len(missing)} of its "
                f"{len(expected)} files, the first {missing[0]}. Finish computing the table, or copy all of it."
            )


def _check_key(root: Path, key: TableKey) -> None:
    """Raise TableError if `root` has no table with this key."""
    path = root / key.digest / TABLE_FILE
    if path.is_file():
        if differences := _differences(path, key):
            raise TableError(f"{path} does not match the name of its folder: {'; '.join(differences)}")
        return
    others = [f"  - {other.parent}: {'; '.join(_differences(other, key))}" for other in root.glob(f"*/{TABLE_FILE}")]
    found = "\n".join(["Other tables there:", *sorted(others)]) if others else "It has no other tables."
    raise TableError(f"{root} has no logit table of this backbone and data ({key.digest}). {found}")


def _differences(path: Path, key: TableKey) -> list[str]:
    """Return the differences between a table.json and a key, one sentence each."""
    try:
        theirs = json.loads(path.read_text())
    except ValueError as error:
        return [f"its {TABLE_FILE} is damaged ({error})"]
    ours = key.content
    return [
        f"{name} is {theirs.get(name)!r}, expected {ours.get(name)!r}"
        for name in sorted({*ours, *theirs})
        if theirs.get(name) != ours.get(name)
    ]


def crop_folder(folder: Path, crop_epoch: int) -> Path:
    """Return the folder of one epoch of crops."""
    return folder / f"crops-{crop_epoch:05}"


def chunk_path(folder: Path, crop_epoch: int, chunk: int) -> Path:
    """Return the path of the file of a chunk."""
    return crop_folder(folder, crop_epoch) / f"chunk-{chunk:05}.npy"


def write_chunk(path: Path, logits_NRK: NDArray[np.float16]) -> None:
    """Write the logits (n, R, K) of a chunk to its file, with a checksum."""
    file = io.BytesIO()
    np.save(file, logits_NRK)
    content = file.getvalue()
    write_whole(path, content + hashlib.sha256(content).digest())


def map_chunk(folder: Path, key: TableKey, crop_epoch: int, chunk: int) -> NDArray[np.float16]:
    """Memory-map the logits (n, R, K) of a chunk. Raise TableError if the file is missing or damaged."""
    path = chunk_path(folder, crop_epoch, chunk)
    first, last = key.bounds(chunk)
    expected = (last - first, len(key.resolutions), key.num_classes)
    size = hashlib.sha256().digest_size
    try:
        content = np.memmap(path, np.uint8, "r").data
        if hashlib.sha256(content[:-size]).digest() != content[-size:]:
            raise ValueError("its checksum differs")
        logits_NRK = np.load(path, mmap_mode="r")
        if logits_NRK.dtype != np.float16 or logits_NRK.shape != expected:
            raise ValueError(f"it contains {logits_NRK.dtype} {logits_NRK.shape} instead of float16 {expected}")
    except (OSError, ValueError) as error:
        raise TableError(
            f"{path} of the logit table is missing or damaged ({error}). Resume the run, which computes the file again."
        ) from error
    return logits_NRK


def copy_table(source: Path, target: Path, key: TableKey, crop_epochs: Sequence[int]) -> None:
    """Copy missing epochs of crops to a node's own disk. One process per node copies, the others wait.

    Raises:
        TableError: `source` has no complete table with this key.
    """
    LogitTable(source, key, crop_epochs)
    with exclusive(target / key.digest, waiting=lambda: None):
        for crop_epoch in crop_epochs:
            folder = crop_folder(target / key.digest, crop_epoch)
            folder.mkdir(exist_ok=True)
            for chunk in range(key.num_chunks):
                path = chunk_path(target / key.digest, crop_epoch, chunk)
                if not path.exists():
                    write_whole(path, chunk_path(source / key.digest, crop_epoch, chunk).read_bytes())
        write_whole(target / key.digest / TABLE_FILE, (source / key.digest / TABLE_FILE).read_bytes())


BATCH_SAMPLES = 128
"""The number of samples in a forward pass of the backbone, without gradient."""

BackboneLogits = Callable[[Mapping[int, Tensor]], Tensor]
"""Maps images on the backbone's device, {side: uint8 (n, side, side, 3)}, to logits (n, R, K)."""


def fill_table(
    root: Path,
    key: TableKey,
    crop_epochs: Sequence[int],
    loader: Batches,
    backbone_logits: BackboneLogits,
    *,
    device: torch.device,
    show: Callable[[str], None],
) -> None:
    """Compute the missing chunks of a table for the crops of some epochs. Every rank must call this.

    Each chunk is written by one rank. Intact chunks are kept, damaged ones are computed again.

    Args:
        root: folder of tables, the same for every rank.
        crop_epochs: the loader's epochs whose crops are used.
        loader: loads the split of the key.
        backbone_logits: maps images on `device`, {side: uint8 (n, side, side, 3)}, to logits (n, R, K).
        show: called with one line of text for every crop epoch that was incomplete.

    Raises:
        UnfillableTableError: on every rank, if the disk has too little space or a logit is not a finite float16.
    """
    folder, rank, world_size = root / key.digest, distributed.rank(), distributed.world_size()
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_whole(folder / TABLE_FILE, json.dumps(key.content, indent=2) + "\n")
    # Ranks take turns over the chunks of all epochs: one epoch may have fewer chunks than there are ranks.
    mine = {
        crop_epoch: range((rank - crop_epoch * key.num_chunks) % world_size, key.num_chunks, world_size)
        for crop_epoch in crop_epochs
    }
    missing = {
        crop_epoch: [chunk for chunk in chunks if not _is_intact(folder, key, crop_epoch, chunk)]
        for crop_epoch, chunks in mine.items()
    }
    with _on_every_rank():
        _check_room(folder, key, sum(map(len, missing.values())) * world_size)
    for number, crop_epoch in enumerate(crop_epochs, 1):
        started = time.perf_counter()
        crop_folder(folder, crop_epoch).mkdir(exist_ok=True)
        # All ranks synchronize at the end of every epoch, so that none waits longer than one epoch for another.
        with _on_every_rank():
            for chunk, logits_NRK in _compute(key, crop_epoch, missing[crop_epoch], loader, backbone_logits, device):
                write_chunk(chunk_path(folder, crop_epoch, chunk), logits_NRK)
        count = sum(last - first for first, last in map(key.bounds, missing[crop_epoch]))
        count = int(distributed.sum_over_ranks(torch.tensor(count, device=device)))
        if count:
            speed = count / (time.perf_counter() - started)
            show(
                f"logit table of {key.split}: crops {number}/{len(crop_epochs)}  {count:,} images  {speed:.0f} images/s"
            )


@contextmanager
def _on_every_rank() -> Iterator[None]:
    """Wait until every rank reaches the end of the `with` block. Raise an UnfillableTableError of one rank on all
    ranks."""
    problem: str | None = None
    try:
        yield
    except UnfillableTableError as error:
        problem = str(error)
    problems = [other for other in distributed.gather(problem) if other is not None]
    if problems:
        raise UnfillableTableError(problems[0])


def _check_room(folder: Path, key: TableKey, num_chunks: int) -> None:
    needed, free = num_chunks * key.crop_bytes // key.num_chunks, shutil.disk_usage(folder).free
    if needed > free:
        raise UnfillableTableError(
            f"The logit table needs {shown_bytes(needed)} more in {folder}, which has {shown_bytes(free)} free. "
            "Free some space, lower stages.predictor.num_crops, or set stages.predictor.logits=live."
        )


def _compute(
    key: TableKey,
    crop_epoch: int,
    chunks: Sequence[int],
    loader: Batches,
    backbone_logits: BackboneLogits,
    device: torch.device,
) -> Iterator[tuple[int, NDArray[np.float16]]]:
    """Yield each chunk's number and its logits (n, R, K)."""
    batches = {chunk: _batches(*key.bounds(chunk)) for chunk in chunks}
    samples = [indices_N for parts in batches.values() for indices_N in parts]
    with closing(loader.read(crop_epoch, samples, sides=key.resolutions)) as epoch:
        for chunk, parts in batches.items():
            yield chunk, np.concatenate([_answer(key, next(epoch), backbone_logits, device) for _ in parts])


def _batches(first: int, last: int) -> list[NDArray[np.int64]]:
    return [np.arange(start, min(start + BATCH_SAMPLES, last)) for start in range(first, last, BATCH_SAMPLES)]


@torch.inference_mode()
def _answer(key: TableKey, batch: Any, backbone_logits: BackboneLogits, device: torch.device) -> NDArray[np.float16]:
    images = {side: pixels.to(device, non_blocking=True) for side, pixels in batch.images.items()}
    logits_NRK = backbone_logits(images).half()
    invalid = (~logits_NRK.isfinite()).nonzero()
    if len(invalid):
        row, resolution, _ = invalid[0].tolist()
        raise UnfillableTableError(
            f"The backbone's logits are infinite, NaN or beyond float16 (65504) for sample {batch.indices[row]} of "
            f"{key.split} at {key.resolutions[resolution]} px. Train the backbone again with a lower learning rate or "
            "with clip_grad_norm, or set stages.predictor.logits=live."
        )
    return logits_NRK.cpu().numpy()


def _is_intact(folder: Path, key: TableKey, crop_epoch: int, chunk: int) -> bool:
    try:
        map_chunk(folder, key, crop_epoch, chunk)
    except TableError:
        return False
    return True
