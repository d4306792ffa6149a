"""FFCV's reader, memory map and pipeline, without what FFCV does to the process that uses it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
import numba.typed
import numpy as np
import torch
from numba.core.compiler_lock import global_compiler_lock


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put back what FFCV changes for the whole process when it is imported and when a loader is built.

    These are the thread counts of torch and numba, and numba's type of a byte array, which FFCV declares read-only (it
    means its own memory map): a function compiled after that could not write bytes, or could, by the luck of garbage
    collection. So nothing is compiled in between either.
    """
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    bytes_type = numba.uint8[::1]
    with global_compiler_lock:
        try:
            yield
        finally:
            bytes_type.mutable = True
            torch.set_num_threads(torch_threads)
            numba.set_num_threads(numba_threads)


@contextmanager
def _plain_dictionaries() -> Iterator[None]:
    """FFCV keeps two constants in a numba dictionary that takes 3 seconds to compile; a plain one serves as well."""
    compiled = numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = compiled


with _undisturbed(), _plain_dictionaries():
    import ffcv._libffcv
    from ffcv.loader import Loader
    from ffcv.pipeline import Compiler, PipelineSpec
    from ffcv.pipeline.allocation_query import AllocationQuery, allocate_query
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.state import State
    from ffcv.traversal_order.base import TraversalOrder
    from ffcv.utils import cast_int_to_byte_ptr

__all__ = ["LIBRARY", "AllocationQuery", "Engine", "Operation", "State", "TraversalOrder", "cast_int_to_byte_ptr"]

LIBRARY = ctypes.CDLL(ffcv._libffcv.__file__)
"""FFCV's compiled part; the libturbojpeg that it links is reached through it, wherever the system keeps it"""

Memory = dict[str, Any]
"""One slot of a ring: for each field, the array or tuple of arrays that its decoder fills, one row a sample."""


class Engine:
    """A beton with its decoders: an FFCV loader of which everything but the iteration is used.

    FFCV's decoders are built as plain Python functions that call kernels which are kept compiled on disk, because FFCV
    itself compiles them anew in every process. `run` may be called from many threads at once.
    """

    def __init__(self, beton: Path, order: TraversalOrder, fields: Iterable[str], decoders: Mapping[str, Operation]):
        """`fields` are those of the beton; one without a decoder is not read."""
        compiling = Compiler.is_enabled
        Compiler.set_enabled(False)
        try:
            with _undisturbed():
                self._loader = Loader(
                    str(beton),
                    batch_size=1,
                    num_workers=1,
                    os_cache=True,
                    order=order,
                    seed=0,  # unused; left out, FFCV draws one from numpy's global generator
                    drop_last=False,
                    pipelines=dict.fromkeys(fields)
                    | {name: PipelineSpec(name, decoder=decoder) for name, decoder in decoders.items()},
                )
        finally:
            Compiler.set_enabled(compiling)
        manager = self._loader.memory_manager
        # Python sets of half a kilobyte a sample, which only FFCV's own quasi-random order reads.
        manager.sample_to_pages = manager.page_to_samples = manager.ptr_to_size = None
        self._storage = manager.schedule_epoch([])
        self._storage.__enter__()
        self._nodes = {name: node.id for name, node in self._loader.graph.leaf_nodes.items()}
        self._beton = beton
        self.num_samples = self._loader.reader.num_samples

    def allocate(self, batch_size: int, num_slots: int, empty: Mapping[str, Collection[int]]) -> list[Memory]:
        """Memory for `num_slots` batches of up to `batch_size` samples, pinned where there is a GPU.

        Args:
            empty: for a field with several arrays, the places of those that get no rows.
        """
        queries = self._loader.graph.collect_requirements()[0]["operation"]
        allocated = {
            name: _allocate(queries[node], batch_size, num_slots, empty.get(name, ()))
            for name, node in self._nodes.items()
        }
        return [{name: _select(arrays, slot) for name, arrays in allocated.items()} for slot in range(num_slots)]

    def fetch(self, pages: Iterable[int], page_size: int) -> None:
        """Have the system read pages of the beton, which are about to be used, into its cache; does not wait for it."""
        with self._beton.open("rb") as file:
            for page in pages:
                os.posix_fadvise(file.fileno(), page * page_size, page_size, os.POSIX_FADV_WILLNEED)

    def run(self, views: np.ndarray, memory: Memory, rows: slice) -> None:
        """Decode `views[rows]` into the same rows of `memory`."""
        arguments = {f"memory_{self._nodes[name]}": _select(arrays, rows) for name, arrays in memory.items()}
        arguments |= {f"shared_memory_{node}": None for node in self._nodes.values()}
        stages, _ = self._loader.code
        for stage, _ in stages:
            stage(
                batch_indices=views[rows],
                metadata=self._loader.reader.metadata,
                storage_state=self._storage.state,
                **arguments,
            )


def _allocate(query: AllocationQuery | Sequence, batch_size: int, num_slots: int, empty: Collection[int]) -> Any:
    if isinstance(query, AllocationQuery):
        return allocate_query(query, batch_size, num_slots)
    return tuple(allocate_query(one, 0 if place in empty else batch_size, num_slots) for place, one in enumerate(query))


def _select(arrays: Any, rows: int | slice) -> Any:
    return tuple(array[rows] for array in arrays) if isinstance(arrays, tuple) else arrays[rows]
