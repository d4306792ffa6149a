from __future__ import annotations

import numpy as np
import pytest
from xxhash import xxh64_intdigest

from datasets.loading.kernels import mark_changed, xxh64


@pytest.mark.parametrize("size", [*range(70), 1000, 28_001])
def test_checksum_is_xxh64(size):
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    words = np.zeros(size // 8 + 1, np.uint64)
    words.view(np.uint8)[:size] = content
    assert int(xxh64(words, size)) == xxh64_intdigest(content.tobytes())


def test_only_changed_samples_are_marked():
    sizes = np.array([100, 33, 1, 257])
    offsets = np.cumsum(sizes) - sizes
    storage = np.random.default_rng(0).integers(0, 256, sizes.sum(), dtype=np.uint8)
    parts = np.split(storage, offsets[1:])
    checksums = np.array([xxh64_intdigest(part.tobytes()) for part in parts], np.uint64)
    status = np.zeros(4, np.uint8)
    mark_changed(storage, offsets, sizes, checksums, status, 4)
    assert status.tolist() == [0, 0, 0, 0]
    storage[offsets[1] + 32] ^= 1
    mark_changed(storage, offsets, sizes, checksums, status, 4)
    assert status.tolist() == [0, 4, 0, 0]
    mark_changed(storage, offsets[:0], sizes[:0], checksums[:0], status[:0], 4)
