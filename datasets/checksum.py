"""XXH64 over many samples, compiled: it costs a hundredth of decoding them, so every sample is checked when it is read.

A JPEG carries no checksum, and damage in its midst mostly decodes to noise without a complaint. xxhash computes the
same when a beton is written; here it has to run without the interpreter's lock, many samples a call. The algorithm is
Yann Collet's specification of XXH64, with seed 0.
"""

from __future__ import annotations

import numpy as np
from numba import njit

PRIME_1, PRIME_2 = np.uint64(11400714785074694791), np.uint64(14029467366897019727)
PRIME_3, PRIME_4 = np.uint64(1609587929392839161), np.uint64(9650029242287828579)
PRIME_5 = np.uint64(2870177450012600261)
LANES = 4
WORD, HALF_WORD = 8, 4  # bytes

compiled = njit(nogil=True, error_model="numpy")
kept = njit(nogil=True, error_model="numpy", cache=True)


@kept
def mark_changed(storage, offsets_N, sizes_N, checksums_N, status_N, changed):
    """Set the status of every sample whose bytes do not have its checksum to `changed`.

    Args:
        storage: uint8, the bytes of the beton.
        offsets_N, sizes_N: int64, where in it each JPEG is.
        checksums_N: uint64, of each.
        status_N: uint8.
    """
    aligned = np.empty(-(-max(1, sizes_N.max()) // WORD), np.uint64) if len(sizes_N) else np.empty(0, np.uint64)
    for n in range(len(sizes_N)):
        content, source = aligned.view(np.uint8), storage[offsets_N[n] : offsets_N[n] + sizes_N[n]]
        for i in range(len(source)):  # numba copies slices element by element, this loop as a whole
            content[i] = source[i]
        if xxh64(aligned, sizes_N[n]) != checksums_N[n]:
            status_N[n] = changed


@kept
def xxh64(words, size):
    """XXH64 of the first `size` bytes of `words`, uint64."""
    num_words = size // WORD
    done = num_words // LANES * LANES
    if done:
        first, second, third, fourth = PRIME_1 + PRIME_2, PRIME_2, np.uint64(0), np.uint64(0) - PRIME_1
        for i in range(0, done, LANES):
            first, second = mixed(first, words[i]), mixed(second, words[i + 1])
            third, fourth = mixed(third, words[i + 2]), mixed(fourth, words[i + 3])
        digest = rotated(first, 1) + rotated(second, 7) + rotated(third, 12) + rotated(fourth, 18)
        for lane in (first, second, third, fourth):
            digest = (digest ^ mixed(np.uint64(0), lane)) * PRIME_1 + PRIME_4
    else:
        digest = PRIME_5
    digest += np.uint64(size)
    for i in range(done, num_words):
        digest = rotated(digest ^ mixed(np.uint64(0), words[i]), 27) * PRIME_1 + PRIME_4
    content, rest = words.view(np.uint8), num_words * WORD
    if size - rest >= HALF_WORD:
        half = np.uint64(words.view(np.uint32)[rest // HALF_WORD])
        digest = rotated(digest ^ (half * PRIME_1), 23) * PRIME_2 + PRIME_3
        rest += HALF_WORD
    for i in range(rest, size):
        digest = rotated(digest ^ (np.uint64(content[i]) * PRIME_5), 11) * PRIME_1
    digest = (digest ^ (digest >> np.uint64(33))) * PRIME_2
    digest = (digest ^ (digest >> np.uint64(29))) * PRIME_3
    return digest ^ (digest >> np.uint64(32))


@compiled
def mixed(lane, word):
    """One round."""
    return rotated(lane + word * PRIME_2, 31) * PRIME_1


@compiled
def rotated(value, bits):
    """Bits moved to the left, and in again on the right."""
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))
