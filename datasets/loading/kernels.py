"""The compiled part of the loader: from a JPEG and a sample key to the same crop at every side.

It is one file, because numba only looks at the file of the outermost function to decide whether the compiled code on
disk is up to date. All arithmetic that decides a pixel uses integers, or IEEE operations in a fixed order (no
fastmath), so the pixels are the same on every machine.

It has three parts: checksums of the stored JPEGs, the box of a crop, and decoding and resizing.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import os
import stat
import tempfile
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
from numba import carray, njit, types

from datasets.loading.order import GOLDEN_RATIO, splitmix64
from datasets.turbojpeg import STOP_ON_WARNING


def _ensure_cache() -> None:
    """Let numba keep compiled code in a temporary folder if it can write neither here nor in the home folder."""
    try:
        njit(cache=True)(splitmix64)
    except RuntimeError:  # "no locator available"
        # The environment variable also reaches child processes, and numba reads it again before it compiles.
        os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = _temporary_cache()


def _temporary_cache() -> str:
    """Return the folder for compiled code, the same in every process. Only this user can write to it: numba runs it."""
    folder = Path(tempfile.gettempdir(), f"numba-cache-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
        return str(folder)
    return tempfile.mkdtemp(prefix="numba-cache-")


_ensure_cache()

njit_cached = njit(nogil=True, error_model="numpy", cache=True)
"""Decorates functions that Python calls: they are compiled once for each machine and kept on disk."""
njit_inline = njit(nogil=True, error_model="numpy")
"""Decorates functions that only compiled functions call."""

mix = njit_inline(splitmix64)

# XXH64 (Yann Collet's specification, seed 0). A JPEG has no checksum, and damage in its middle usually decodes to noise
# without an error. The check costs 1 % of decoding, so every sample is checked when it is read. The package xxhash
# computes the same hash when a beton is written; here it runs without the interpreter lock, many samples per call.
PRIME_1, PRIME_2 = np.uint64(11400714785074694791), np.uint64(14029467366897019727)
PRIME_3, PRIME_4 = np.uint64(1609587929392839161), np.uint64(9650029242287828579)
PRIME_5 = np.uint64(2870177450012600261)
LANES = 4
WORD, HALF_WORD = 8, 4  # bytes


@njit_cached
def mark_changed(storage, offsets_N, sizes_N, checksums_N, status_N, changed):
    """Set the status of every sample whose bytes do not match its checksum to `changed`.

    Args:
        storage: uint8, the bytes of the beton.
        offsets_N, sizes_N: int64, the place of each JPEG in it.
        checksums_N: uint64, the checksum of each JPEG.
        status_N: uint8.
    """
    aligned = np.empty(-(-max(1, sizes_N.max()) // WORD), np.uint64) if len(sizes_N) else np.empty(0, np.uint64)
    for n in range(len(sizes_N)):
        content, source = aligned.view(np.uint8), storage[offsets_N[n] : offsets_N[n] + sizes_N[n]]
        for i in range(len(source)):  # numba compiles this loop to one block copy, but not a slice
            content[i] = source[i]
        if xxh64(aligned, sizes_N[n]) != checksums_N[n]:
            status_N[n] = changed


@njit_cached
def xxh64(words, size):
    """Return the XXH64 of the first `size` bytes of `words`, uint64."""
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


@njit_inline
def mixed(lane, word):
    """Return a lane after one round of XXH64."""
    return rotated(lane + word * PRIME_2, 31) * PRIME_1


@njit_inline
def rotated(value, bits):
    """Return `value` rotated left by `bits`."""
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


CROP_ATTEMPTS = 10
FLIP_DRAW = 4 * CROP_ATTEMPTS


@njit_cached
def crop_boxes(keys_N, shapes_N2, crop):
    """Return the box of each key in its image, float64 (N, 5): top, left, height and width in pixels, 1 if mirrored.

    Args:
        keys_N: uint64, from order.pack_keys.
        shapes_N2: int64, height and width of each image in pixels.
        crop: six float64, see `crop_box`.
    """
    boxes_N5 = np.empty((len(keys_N), 5))
    for n in range(len(keys_N)):
        box = crop_box(keys_N[n], shapes_N2[n, 0], shapes_N2[n, 1], crop)
        for i in range(len(box)):
            boxes_N5[n, i] = box[i]
    return boxes_N5


@njit_cached
def crop_box(key, height, width, crop):
    """Return one key's box: top, left, height, width, and 1.0 if it is mirrored, else 0.0.

    `crop` is (lowest area, highest area, log of the lowest ratio, log of the highest ratio, probability of mirroring,
    fraction). A fraction above 0 means a central square of that fraction of the shorter side, and the rest is ignored.
    Otherwise area, ratio and place are drawn as in torchvision's RandomResizedCrop.
    """
    lowest_area, highest_area, lowest_log_ratio, highest_log_ratio, mirror, fraction = crop
    if fraction > 0:
        side = fraction * min(height, width)
        return (height - side) / 2, (width - side) / 2, side, side, 0.0
    mirrored = 1.0 if uniform(key, FLIP_DRAW) < mirror else 0.0
    for attempt in range(CROP_ATTEMPTS):
        draw = 4 * attempt
        area = height * width * (lowest_area + (highest_area - lowest_area) * uniform(key, draw))
        ratio = math.exp(lowest_log_ratio + (highest_log_ratio - lowest_log_ratio) * uniform(key, draw + 1))
        crop_width = math.floor(math.sqrt(area * ratio) + 0.5)
        crop_height = math.floor(math.sqrt(area / ratio) + 0.5)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = math.floor((height - crop_height + 1) * uniform(key, draw + 2))
            left = math.floor((width - crop_width + 1) * uniform(key, draw + 3))
            return float(top), float(left), float(crop_height), float(crop_width), mirrored
    crop_width = min(width, math.floor(height * math.exp(highest_log_ratio) + 0.5))
    crop_height = min(height, math.floor(width / math.exp(lowest_log_ratio) + 0.5))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return float(top), float(left), float(crop_height), float(crop_width), mirrored


@njit_inline
def uniform(key, draw):
    """Return a key's draw-th uniform number in [0, 1): SplitMix64 (Steele et al., OOPSLA 2014) seeded by its hash."""
    bits = mix(mix(key) + np.uint64(draw + 1) * GOLDEN_RATIO)
    return np.float64(bits >> np.uint64(11)) * 2.0**-53


# The status of a sample.
DECODED, NOT_A_JPEG, OTHER_SIZE, DAMAGED, CHANGED = range(5)

# The kinds of planes of a JPEG.
LUMA_AND_CHROMA, RED_GREEN_BLUE, GRAY = 0, 1, 2

# libjpeg-turbo's numbers of color spaces (TJCS); and the luma pixels per chroma pixel, across and down, indexed by its
# numbers of subsamplings (TJSAMP).
TJ_RGB, TJ_YCBCR, TJ_GRAY = 0, 1, 2
CHROMA_ACROSS = np.array([1, 2, 2, 1, 1, 4, 1])
CHROMA_DOWN = np.array([1, 1, 2, 1, 2, 1, 4])
PADDING = 32  # pixels by which libjpeg-turbo may round up the sides of a plane

START_OF_FRAME = (0xC0, 0xC1)  # sequential JPEGs
OTHER_FRAME, START_OF_SCAN, RESTART_INTERVAL = 0xC2, 0xDA, 0xDD
BLOCK_ROWS = 8
MESSAGE_BYTES = 200  # libjpeg-turbo's JMSG_LENGTH_MAX
REST_SKIPPED = np.frombuffer(b" extraneous bytes before marker", np.uint8)

BYTE = np.uint32(0xFF)
TAPS_AT_ONCE = 4  # four bytes are a word, which one instruction moves; fewer passes over the sums
WEIGHT_BITS = 14
LEVEL_BITS = 5  # bits of a gray level's fraction that are kept between resizing and color conversion

# JFIF's chroma factors, in units of 2 ** -14.
RED_OF_RED, GREEN_OF_BLUE, GREEN_OF_RED, BLUE_OF_BLUE = 22970, 5638, 11700, 29032


def _ffcv_library() -> ctypes.CDLL:
    """Load FFCV's compiled library, through which the libturbojpeg that it links can be called.

    It is loaded as a file, because `import ffcv` compiles FFCV's loader for 3 s in every process and sets the thread
    counts of torch and numba.
    """
    package = importlib.util.find_spec("ffcv")
    folders = package.submodule_search_locations if package else None
    files = [file for folder in folders or () for file in Path(folder).glob("_libffcv*.so")]
    if not files:
        raise ImportError("FFCV's compiled library is missing; install the package ffcv (`make setup`)")
    return ctypes.CDLL(str(files[0]))


LIBRARY = _ffcv_library()


def _external(name: str, result: types.Type, *arguments: types.Type) -> types.ExternalFunction:
    """Declare a function of the libturbojpeg that FFCV links, by name: code with an address cannot be cached."""
    address = ctypes.cast(getattr(LIBRARY, name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(name, address)
    return types.ExternalFunction(name, result(*arguments))


_pointer, _int = types.uintp, types.int32
tj_init = _external("tjInitDecompress", _pointer)
tj_destroy = _external("tjDestroy", _int, _pointer)
tj_header = _external("tjDecompressHeader3", _int, _pointer, _pointer, types.uintp, *(_pointer,) * 4)
tj_planes = _external(
    "tjDecompressToYUVPlanes", _int, _pointer, _pointer, types.uintp, _pointer, _int, _pointer, _int, _int
)
tj_message = _external("tjGetErrorStr2", types.voidptr, _pointer)


@njit_cached
def decode_boxes(storage, offsets_N, sizes_N, shapes_N2, boxes_N5, sides_R, images, starts_R, status_N):
    """Decode JPEGs and resize a box of each to every side.

    Luma and chroma are resized as stored, chroma mostly at half the size, and only the result is converted to RGB. This
    halves the number of pixels to blend, and converts only visible ones.

    Args:
        storage: uint8, the bytes of the beton.
        offsets_N, sizes_N: int64, the place of each JPEG in it.
        shapes_N2: int64, the expected height and width of each JPEG in pixels.
        boxes_N5: float64, from crop_boxes.
        sides_R: int64, the output sizes in pixels.
        images: uint8, written: one block of memory for the images of all sides, because numba would compile again for
            every number of arrays.
        starts_R: int64, where the images of each side, uint8 (N, side, side, 3), start in the block; -1 for an
            unwanted side. Such a side still counts for how finely JPEGs are decoded, so the pixels of the others do
            not change.
        status_N: uint8, read and written; samples whose status is not DECODED are skipped.
    """
    largest, smallest = sides_R.max(), sides_R.min()
    decoder = tj_init()
    jpeg, pixels, levels = np.empty(0, np.uint8), np.empty(0, np.uint8), np.empty(3 * largest**2, np.int16)
    for n in np.flatnonzero(status_N == DECODED):
        height, width = shapes_N2[n]
        top, left, crop_height, crop_width, mirrored = boxes_N5[n]
        fraction = dct_fraction(crop_height, crop_width, largest)
        jpeg = with_room(jpeg, sizes_N[n])
        source = storage[offsets_N[n] : offsets_N[n] + sizes_N[n]]
        for i in range(len(source)):  # numba compiles this loop to one block copy, but not a slice
            jpeg[i] = source[i]
        rows, pitch = height // fraction + PADDING, width // fraction + PADDING
        pixels = with_room(pixels, 3 * rows * pitch)
        planes = pixels[: 3 * rows * pitch].reshape(3, rows, pitch)
        status_N[n], colors, across, down, rows, columns = decode_planes(
            decoder, jpeg[: sizes_N[n]], height, width, top + crop_height, crop_height / smallest, fraction, planes
        )
        if status_N[n] != DECODED:
            continue
        top, left = top / fraction, left / fraction
        crop_height, crop_width = crop_height / fraction, crop_width / fraction
        chroma_rows, chroma_columns = -(-rows // down), -(-columns // across)
        for r in range(len(sides_R)):
            if starts_R[r] < 0:
                continue
            side = sides_R[r]
            levels_CYX = levels[: 3 * side**2].reshape(3, side, side)
            resize(planes[:1, :rows, :columns], top, left, crop_height, crop_width, mirrored > 0, levels_CYX[:1])
            if colors != GRAY:
                box = top / down, left / across, crop_height / down, crop_width / across
                resize(planes[1:, :chroma_rows, :chroma_columns], *box, mirrored > 0, levels_CYX[1:])
            size = side * side * 3
            start = starts_R[r] + n * size
            write_rgb(levels_CYX, colors, images[start : start + size].reshape(side, side * 3))
    tj_destroy(decoder)


@njit_inline
def with_room(array, size):
    """Return `array`, or a new one if it has fewer than `size` elements."""
    return array if array.size >= size else np.empty(size, array.dtype)


@njit_inline
def decode_planes(decoder, jpeg, height, width, bottom, scale, fraction, planes):
    """Decode a JPEG at a DCT fraction of its size. A warning of the library counts as a failure.

    Rows below the crop are skipped where possible, by writing a smaller height into the header in `jpeg`.

    Args:
        bottom, scale: the bottom of the crop, and the size of a pixel of the smallest side, both in image pixels.
        planes: uint8 (3, rows, columns), written: luma, blue and red chroma, starting at the upper left.

    Returns:
        The status; the kind of planes; luma pixels per chroma pixel, across and down; rows and columns of the first
        plane.
    """
    header = np.zeros(4, np.int32)
    word = header.itemsize
    address = header.ctypes.data
    source = jpeg.ctypes.data
    if tj_header(decoder, source, jpeg.size, address, address + word, address + 2 * word, address + 3 * word) != 0:
        return NOT_A_JPEG, GRAY, 1, 1, 0, 0
    subsampling, color_space = header[2], header[3]
    if header[0] != width or header[1] != height or color_space > TJ_GRAY or subsampling >= len(CHROMA_DOWN):
        return OTHER_SIZE, GRAY, 1, 1, 0, 0
    colors = GRAY if color_space == TJ_GRAY else LUMA_AND_CHROMA if color_space == TJ_YCBCR else RED_GREEN_BLUE

    down = CHROMA_DOWN[subsampling]
    frame, flags, block, pixel = position_of_height(jpeg), 0, BLOCK_ROWS * down, fraction * down
    # The filter reaches below the crop by one pixel of the smallest side or of chroma, whichever is larger.
    needed = math.ceil((bottom + max(scale, pixel) + pixel) / block) * block
    left_out = frame >= 0 and needed < height
    if left_out:
        height, flags = needed, STOP_ON_WARNING
        jpeg[frame], jpeg[frame + 1] = height >> 8, height & 0xFF
    rows, columns, pitch = -(-height // fraction), -(-width // fraction), planes.shape[2]
    addresses = np.array([planes[0].ctypes.data, planes[1].ctypes.data, planes[2].ctypes.data], np.uintp)
    pitches = np.array([pitch, pitch, pitch], np.int32)
    targets, strides = addresses.ctypes.data, pitches.ctypes.data
    failed = tj_planes(decoder, source, jpeg.size, targets, columns, strides, rows, flags) != 0
    if failed and not (left_out and only_skipped_the_rest(decoder)):
        return DAMAGED, colors, 1, 1, 0, 0
    return DECODED, colors, CHROMA_ACROSS[subsampling], down, rows, columns


@njit_inline
def position_of_height(jpeg):
    """Return the position of the height, two bytes, in the header; -1 unless the data holds the rows in order.

    A sequential JPEG with one scan does. JPEGs with restart markers give -1 too, because libjpeg-turbo reports
    damage between markers in the same way as skipped rows.
    """
    frame, num_components, position = -1, 0, 2
    while position + 9 < len(jpeg):
        if jpeg[position] != 0xFF:
            return -1
        marker = jpeg[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker in START_OF_FRAME:
            frame, num_components = position + 5, jpeg[position + 9]
        elif marker in (OTHER_FRAME, RESTART_INTERVAL):
            return -1
        elif marker == START_OF_SCAN:
            return frame if jpeg[position + 4] == num_components else -1
        position += 2 + (np.int64(jpeg[position + 2]) << 8) + jpeg[position + 3]
    return -1


@njit_inline
def only_skipped_the_rest(decoder):
    """Return whether the library's first warning is about data after the last row, so that all rows are undamaged.

    A warning about damaged rows would come first.
    """
    message = carray(tj_message(decoder), (MESSAGE_BYTES,), np.uint8)
    for start in range(MESSAGE_BYTES - len(REST_SKIPPED)):
        if message[start] == 0:
            return False
        if (message[start : start + len(REST_SKIPPED)] == REST_SKIPPED).all():
            return True
    return False


@njit_inline
def dct_fraction(crop_height, crop_width, largest):
    """Return 8, 4 or 2 if the crop at that fraction of its size still has `largest` pixels each way, else 1."""
    for fraction in (8, 4, 2):
        if min(crop_height, crop_width) >= fraction * largest:
            return fraction
    return 1


@njit_cached
def resize(planes, top, left, height, width, mirrored, levels_CYX):
    """Resize a box of planes, uint8 (C, rows, columns), to int16 (C, side, side) in 2 ** -LEVEL_BITS of a gray level.

    The filter is Pillow's antialiased BILINEAR: a triangle as wide as the downscaling, at least two pixels. Rows are
    blended first, because whole rows use the full width of the vector units.
    """
    _, num_rows, num_columns = planes.shape
    side = levels_CYX.shape[1]
    first_rows, num_row_taps, row_weights_ST = filter_taps(top, height, num_rows, side, False)
    first_columns, num_column_taps, column_weights_ST = filter_taps(left, width, num_columns, side, mirrored)
    column_weights_TS = np.ascontiguousarray(column_weights_ST.T)
    start = min(first_columns[0], first_columns[-1])
    stop = max(first_columns[0], first_columns[-1]) + num_column_taps
    word_starts = (first_columns - start).astype(np.uint64)

    sums = np.empty(max(stop - start, side), np.int32)
    row = np.zeros(-(-(stop - start) // TAPS_AT_ONCE) * TAPS_AT_ONCE + len(column_weights_TS), np.uint8)
    words = np.lib.stride_tricks.as_strided(row.view(np.uint32), (len(row) - TAPS_AT_ONCE + 1,), (1,))
    taps = np.empty(side, np.uint32)
    for channel in range(len(planes)):
        for y in range(side):
            rows = planes[channel, first_rows[y] : first_rows[y] + num_row_taps, start:stop]
            blend_rows(rows, row_weights_ST[y], sums, row[: stop - start])
            blend_columns(words, word_starts, column_weights_TS, taps, sums, levels_CYX[channel, y])


@njit_inline
def filter_taps(origin, extent, limit, side, mirrored):
    """Return which source pixels blend into each output pixel.

    The results are the first of them, int64 (side,), their number, the same for all, and their weights, int16
    (side, taps). The weights sum to 1 << WEIGHT_BITS and are padded with zeros to a multiple of TAPS_AT_ONCE taps.
    """
    num_taps = 1
    for i in range(side):
        first, last, _, _ = filter_window(origin, extent, limit, side, i)
        num_taps = max(num_taps, last - first)
    starts = np.empty(side, np.int64)
    weights = np.zeros((side, -(-num_taps // TAPS_AT_ONCE) * TAPS_AT_ONCE), np.int16)
    for i in range(side):
        first, last, center, support = filter_window(origin, extent, limit, side, i)
        start = min(first, limit - num_taps)
        to = side - 1 - i if mirrored else i
        starts[to] = start
        total = 0.0
        for k in range(first, last):
            total += 1 - abs(k + 0.5 - center) / support
        rest, heaviest = 1 << WEIGHT_BITS, first - start
        for k in range(first, last):
            weight = int((1 - abs(k + 0.5 - center) / support) / total * (1 << WEIGHT_BITS) + 0.5)
            weights[to, k - start] = weight
            rest -= weight
            if weight > weights[to, heaviest]:
                heaviest = k - start
        weights[to, heaviest] += rest
    return starts, num_taps, weights


@njit_inline
def filter_window(origin, extent, limit, side, i):
    """Return the first and one past the last source pixel under output pixel i's triangle, its center and half base."""
    scale = extent / side
    support = max(scale, 1.0)
    center = origin + (i + 0.5) * scale
    return max(int(center - support + 0.5), 0), min(int(center + support + 0.5), limit), center, support


@njit_inline
def blend_rows(rows, weights, sums, blended):
    """Write the weighted sum of rows, uint8 (taps, n), into blended, uint8 (n,)."""
    last, size, half = len(rows) - 1, len(blended), 1 << (WEIGHT_BITS - 1)
    for k in range(0, len(rows), TAPS_AT_ONCE):
        row_0, row_1, row_2, row_3 = rows[k], rows[min(k + 1, last)], rows[min(k + 2, last)], rows[min(k + 3, last)]
        weight_0, weight_1 = np.int32(weights[k]), np.int32(weights[k + 1])
        weight_2, weight_3 = np.int32(weights[k + 2]), np.int32(weights[k + 3])
        for i in range(size):
            early = np.int32(weight_0 * row_0[i]) + np.int32(weight_1 * row_1[i])
            late = np.int32(weight_2 * row_2[i]) + np.int32(weight_3 * row_3[i])
            sums[i] = np.int32(early + late + (sums[i] if k else half))
    for i in range(size):
        blended[i] = sums[i] >> WEIGHT_BITS


@njit_inline
def blend_columns(words, starts, weights_TS, taps, sums, levels):
    """Write weighted sums of a row's neighbors into levels, int16 (side,), in 2 ** -LEVEL_BITS of a gray level.

    Args:
        words: uint32, TAPS_AT_ONCE bytes of the row starting at every byte.
        starts: uint64 (side,), the first neighbor of each output.
        taps: uint32 (side,), and `sums`, int32, at least (side,): scratch memory.
    """
    side, half = len(levels), 1 << (WEIGHT_BITS - LEVEL_BITS - 1)
    for k in range(0, len(weights_TS), TAPS_AT_ONCE):
        weights_0, weights_1 = weights_TS[k], weights_TS[k + 1]
        weights_2, weights_3 = weights_TS[k + 2], weights_TS[k + 3]
        for x in range(side):  # separate from the next loop, which can then be vectorized
            taps[x] = words[starts[x] + np.uint64(k)]
        for x in range(side):
            blend = weighted(taps[x], weights_0[x], weights_1[x], weights_2[x], weights_3[x])
            sums[x] = np.int32(blend + (sums[x] if k else half))
    for x in range(side):
        levels[x] = sums[x] >> (WEIGHT_BITS - LEVEL_BITS)


@njit_inline
def weighted(word, weight_0, weight_1, weight_2, weight_3):
    """Return the weighted sum of the four bytes of a word, starting with the lowest."""
    early = product(weight_0, word & BYTE) + product(weight_1, word >> np.uint32(8) & BYTE)
    late = product(weight_2, word >> np.uint32(16) & BYTE) + product(weight_3, word >> np.uint32(24))
    return np.int32(early + late)


@njit_inline
def product(one, other):
    """Return the product in 32 bits; numba would use 64, which halves what fits into a vector."""
    return np.int32(np.int32(one) * np.int32(other))


@njit_inline
def write_rgb(levels_CYX, colors, image):
    """Convert levels, int16 (3, side, side), to RGB in `image`, uint8 (side, side * 3), with JFIF's factors."""
    side = levels_CYX.shape[1]
    channels = np.empty((3, side), np.uint8)
    first, second, third = channels[0], channels[1], channels[2]
    for y in range(side):
        luma_X, blue_X, red_X, row = levels_CYX[0, y], levels_CYX[1, y], levels_CYX[2, y], image[y]
        if colors == LUMA_AND_CHROMA:
            for x in range(side):
                b, r = chroma(blue_X[x]), chroma(red_X[x])
                first[x] = clipped(np.int16(luma_X[x] + high(r, RED_OF_RED)))
                second[x] = clipped(np.int16(luma_X[x] - high(b, GREEN_OF_BLUE) - high(r, GREEN_OF_RED)))
                third[x] = clipped(np.int16(luma_X[x] + high(b, BLUE_OF_BLUE)))
        else:
            for x in range(side):
                first[x] = clipped(luma_X[x])
                second[x] = first[x] if colors == GRAY else clipped(blue_X[x])
                third[x] = first[x] if colors == GRAY else clipped(red_X[x])
        for x in range(side):
            row[3 * x] = first[x]
            row[3 * x + 1] = second[x]
            row[3 * x + 2] = third[x]


@njit_inline
def chroma(level):
    """Return a chroma level centered at zero, shifted so that `high` with one of JFIF's factors gives a level."""
    return np.int16(np.int16(level - (128 << LEVEL_BITS)) << 2)


@njit_inline
def high(one, other):
    """Return the high half of a product of two int16, which is one vector instruction."""
    return np.int16(product(one, other) >> 16)


@njit_inline
def clipped(level):
    """Return the nearest of the 256 gray levels."""
    return np.uint8(min(max(np.int16(level + (1 << (LEVEL_BITS - 1))) >> LEVEL_BITS, 0), 255))
