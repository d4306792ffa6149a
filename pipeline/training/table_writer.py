"""Computes a logit table: every rank its chunks, in batches of their own, from where an earlier attempt was killed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.files import write_whole
from pipeline.training import distributed
from pipeline.training.logit_table import (
    TABLE_FILE,
    TableError,
    TableKey,
    UnfillableTableError,
    chunk_path,
    map_chunk,
    view_folder,
    write_chunk,
)

if TYPE_CHECKING:
    from pipeline.training.loop import Batches

BATCH_SAMPLES = 128
"""samples of a forward pass of the backbone, without gradient"""

BackboneLogits = Callable[[Mapping[int, Tensor]], Tensor]
"""images on the backbone's device, {side: uint8 (n, side, side, 3)} -> logits (n, R, K)"""


def fill_table(
    root: Path,
    key: TableKey,
    views: Sequence[int],
    loader: Batches,
    backbone_logits: BackboneLogits,
    *,
    device: torch.device,
    tell: Callable[[str], None],
) -> None:
    """Compute what is missing of some views; when it returns, they are complete. Every rank must call it.

    A chunk has one rank that writes it. Chunks that are there and sound are left as they are, damaged ones are
    computed anew.

    Args:
        root: folder of tables, the same for every rank.
        views: numbers of the loader's epochs whose crops are shown.
        loader: of the key's split.
        backbone_logits: images on `device`, {side: uint8 (n, side, side, 3)}, -> logits (n, R, K).
        tell: is told about every view of which something was missing.

    Raises:
        UnfillableTableError: on every rank: the disk has no room for what is missing, or a logit is no finite float16.
    """
    folder, rank, world_size = root / key.digest, distributed.rank(), distributed.world_size()
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_whole(folder / TABLE_FILE, json.dumps(key.content, indent=2) + "\n")
    # Ranks take turns over all chunks of all views: a view may have fewer chunks than there are ranks.
    mine = {view: range((rank - view * key.num_chunks) % world_size, key.num_chunks, world_size) for view in views}
    missing = {
        view: [chunk for chunk in chunks if not _is_sound(folder, key, view, chunk)] for view, chunks in mine.items()
    }
    with _on_every_rank():
        _check_room(folder, key, sum(map(len, missing.values())) * world_size)
    for number, view in enumerate(views, 1):
        started = time.perf_counter()
        view_folder(folder, view).mkdir(exist_ok=True)
        # This also holds every rank until the view is whole, so that none waits for another longer than for one view.
        with _on_every_rank():
            for chunk, logits_NRK in _compute(key, view, missing[view], loader, backbone_logits, device):
                write_chunk(chunk_path(folder, view, chunk), logits_NRK)
        count = sum(last - first for first, last in map(key.bounds, missing[view]))
        count = int(distributed.sum_over_ranks(torch.tensor(count, device=device)))
        if count:
            speed = count / (time.perf_counter() - started)
            tell(f"logit table of {key.split}: view {number}/{len(views)}  {count:,} images  {speed:.0f} images/s")


@contextmanager
def _on_every_rank() -> Iterator[None]:
    """Wait for every rank to reach the end of the body; an UnfillableTableError of one is raised on all."""
    problem: str | None = None
    try:
        yield
    except UnfillableTableError as error:
        problem = str(error)
    problems = [other for other in distributed.gather(problem) if other is not None]
    if problems:
        raise UnfillableTableError(problems[0])


def _check_room(folder: Path, key: TableKey, num_chunks: int) -> None:
    needed, free = num_chunks * key.view_bytes // key.num_chunks, shutil.disk_usage(folder).free
    if needed > free:
        raise UnfillableTableError(
            f"the logit table needs {needed / 1e9:.1f} GB more in {folder}, which has {free / 1e9:.1f} GB free; "
            "make room, lower stages.predictor.views, or set stages.predictor.logits=live"
        )


def _compute(
    key: TableKey,
    view: int,
    chunks: Sequence[int],
    loader: Batches,
    backbone_logits: BackboneLogits,
    device: torch.device,
) -> Iterator[tuple[int, NDArray[np.float16]]]:
    """Each of the chunks with its logits (n, R, K)."""
    batches = {chunk: _batches(*key.bounds(chunk)) for chunk in chunks}
    samples = [indices_N for parts in batches.values() for indices_N in parts]
    with closing(loader.read(view, samples, sides=key.resolutions)) as epoch:
        for chunk, parts in batches.items():
            yield chunk, np.concatenate([_answer(key, next(epoch), backbone_logits, device) for _ in parts])


def _batches(first: int, last: int) -> list[NDArray[np.int64]]:
    return [np.arange(start, min(start + BATCH_SAMPLES, last)) for start in range(first, last, BATCH_SAMPLES)]


@torch.inference_mode()
def _answer(key: TableKey, batch: Any, backbone_logits: BackboneLogits, device: torch.device) -> NDArray[np.float16]:
    images = {side: pixels.to(device, non_blocking=True) for side, pixels in batch.images.items()}
    logits_NRK = backbone_logits(images).half()
    unfit = (~logits_NRK.isfinite()).nonzero()
    if len(unfit):
        row, resolution, _ = unfit[0].tolist()
        raise UnfillableTableError(
            f"the backbone's logits are infinite, NaN or beyond float16 (65504) for sample {batch.indices[row]} of "
            f"{key.split} at {key.resolutions[resolution]} px; train the backbone anew with a lower learning rate or "
            "with clip_grad_norm, or set stages.predictor.logits=live"
        )
    return logits_NRK.cpu().numpy()


def _is_sound(folder: Path, key: TableKey, view: int, chunk: int) -> bool:
    try:
        map_chunk(folder, key, view, chunk)
    except TableError:
        return False
    return True
