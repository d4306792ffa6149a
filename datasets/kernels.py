"""The compiled part of the loader: from a view and its JPEG to the same crop at every side.

All compiled code is in this one file, because numba looks only at the file of the outermost function to tell whether
what it has on disk is still current. Arithmetic that decides a pixel is in integers, or in IEEE operations in a fixed
order (no fastmath), so that the pixels are the same on every machine.
"""

from __future__ import annotations

import ctypes
import math

import llvmlite.binding
import numpy as np
from numba import carray, njit, types

from datasets.engine import LIBRARY, cast_int_to_byte_ptr

# What became of a sample: element of the array `status` of decode_views.
DECODED, NOT_A_JPEG, OTHER_SIZE, DAMAGED = 0, 1, 2, 3

PIXEL_BYTES = 4  # RGBX: a pixel is one 32-bit word, which moves in one instruction
RGBX = 2  # libjpeg-turbo's name of it
BLENDED_AT_ONCE = 4  # fewer passes over the sums
WEIGHT_BITS = 14
HALF = 1 << (WEIGHT_BITS - 1)
CROP_ATTEMPTS = 10
FLIP_DRAW = 4 * CROP_ATTEMPTS
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def _external(name: str, result: types.Type, *arguments: types.Type) -> types.ExternalFunction:
    """A function of the libturbojpeg that FFCV links. Called by name: code that holds an address cannot be kept."""
    address = ctypes.cast(getattr(LIBRARY, name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(name, address)
    return types.ExternalFunction(name, result(*arguments))


_pointer, _int = types.uintp, types.int32
tj_init = _external("tjInitDecompress", _pointer)
tj_destroy = _external("tjDestroy", _int, _pointer)
tj_header = _external("tjDecompressHeader3", _int, _pointer, _pointer, types.uintp, *(_pointer,) * 4)
tj_decode = _external("tjDecompress2", _int, _pointer, _pointer, types.uintp, _pointer, *(_int,) * 5)

compiled = njit(nogil=True, error_model="numpy")
kept = njit(nogil=True, error_model="numpy", cache=True)


@kept
def decode_views(views_N, storage, offsets_N, sizes_N, shapes_N2, crop, sides_R, addresses_R, status_N):
    """Decode, crop, flip and resize samples; the sides of one sample all show the same crop.

    Args:
        views_N: uint64, from order.pack_views.
        storage: uint8, the bytes of the beton.
        offsets_N, sizes_N: int64, where in it each JPEG is.
        shapes_N2: int64, height and width in pixels that each JPEG should have.
        crop: six float64, see `crop_box`.
        sides_R, addresses_R: int64 and uintp, the sizes wanted and where their images, uint8 (N, side, side, 3), are
            written. Addresses, because a tuple of arrays would be another type to compile for each number of sides.
        status_N: uint8, written: DECODED, or why the sample was not.
    """
    largest = sides_R.max()
    decoder = tj_init()
    pixels = np.empty(0, np.uint8)
    for n in range(len(views_N)):
        height, width = shapes_N2[n]
        top, left, crop_height, crop_width, mirrored = crop_box(views_N[n], height, width, crop)
        fraction = dct_fraction(crop_height, crop_width, largest)
        rows, columns = -(-height // fraction), -(-width // fraction)
        if pixels.size < rows * columns * PIXEL_BYTES:
            pixels = np.empty(rows * columns * PIXEL_BYTES, np.uint8)
        jpeg = storage[offsets_N[n] : offsets_N[n] + sizes_N[n]]
        status_N[n] = decode_jpeg(decoder, jpeg, height, width, rows, columns, pixels)
        if status_N[n] != DECODED:
            continue
        image = pixels[: rows * columns * PIXEL_BYTES].reshape(rows, columns * PIXEL_BYTES)
        top, left = top / fraction, left / fraction
        crop_height, crop_width = crop_height / fraction, crop_width / fraction
        for r in range(len(sides_R)):
            side = sides_R[r]
            address = addresses_R[r] + np.uintp(n * side * side * 3)
            out = carray(cast_int_to_byte_ptr(address), (side, side, 3))
            resize(image, top, left, crop_height, crop_width, mirrored, out)
    tj_destroy(decoder)


@compiled
def decode_jpeg(decoder, jpeg, height, width, rows, columns, pixels):
    """Decode to RGBX of rows x columns, a DCT fraction of height x width. A warning of the library is a failure."""
    header = np.zeros(4, np.int32)
    word = header.itemsize
    address = header.ctypes.data
    source = jpeg.ctypes.data
    if tj_header(decoder, source, jpeg.size, address, address + word, address + 2 * word, address + 3 * word) != 0:
        return NOT_A_JPEG
    if header[0] != width or header[1] != height:
        return OTHER_SIZE
    pitch = columns * PIXEL_BYTES
    if tj_decode(decoder, source, jpeg.size, pixels.ctypes.data, columns, pitch, rows, RGBX, 0) != 0:
        return DAMAGED
    return DECODED


@compiled
def dct_fraction(crop_height, crop_width, largest):
    """Decode at 1/8, 1/4 or 1/2 of the size where the crop then still has at least `largest` pixels each way."""
    for fraction in (8, 4, 2):
        if min(crop_height, crop_width) >= fraction * largest:
            return fraction
    return 1


@kept
def crop_box(view, height, width, crop):
    """The crop of a view, in pixels: top, left, height, width (float64), and whether it is mirrored.

    `crop` is (lowest area, highest area, log of the lowest ratio, of the highest, probability of mirroring, fraction).
    A fraction above 0 is a central square of that fraction of the shorter side; the rest is then ignored. Otherwise
    area, ratio and place are drawn as torchvision's RandomResizedCrop draws them.
    """
    lowest_area, highest_area, lowest_log_ratio, highest_log_ratio, mirror, fraction = crop
    if fraction > 0:
        side = fraction * min(height, width)
        return (height - side) / 2, (width - side) / 2, side, side, False
    mirrored = uniform(view, FLIP_DRAW) < mirror
    for attempt in range(CROP_ATTEMPTS):
        draw = 4 * attempt
        area = height * width * (lowest_area + (highest_area - lowest_area) * uniform(view, draw))
        ratio = math.exp(lowest_log_ratio + (highest_log_ratio - lowest_log_ratio) * uniform(view, draw + 1))
        crop_width = math.floor(math.sqrt(area * ratio) + 0.5)
        crop_height = math.floor(math.sqrt(area / ratio) + 0.5)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = math.floor((height - crop_height + 1) * uniform(view, draw + 2))
            left = math.floor((width - crop_width + 1) * uniform(view, draw + 3))
            return float(top), float(left), float(crop_height), float(crop_width), mirrored
    crop_width = min(width, math.floor(height * math.exp(highest_log_ratio) + 0.5))
    crop_height = min(height, math.floor(width / math.exp(lowest_log_ratio) + 0.5))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return float(top), float(left), float(crop_height), float(crop_width), mirrored


@compiled
def uniform(view, draw):
    """The draw-th uniform number in [0, 1) of a view: splitmix64 (Steele et al., OOPSLA 2014) started at its hash."""
    bits = mix(mix(view) + np.uint64(draw + 1) * GOLDEN_RATIO)
    return np.float64(bits >> np.uint64(11)) * 2.0**-53


@compiled
def mix(bits):
    """splitmix64's finaliser."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@kept
def resize(pixels, top, left, height, width, mirrored, image):
    """Resize a box of `pixels`, uint8 (rows, columns * PIXEL_BYTES), to `image`, uint8 (side, side, 3).

    The filter is Pillow's antialiased BILINEAR: a triangle as wide as the downscaling, at least two pixels. Rows are
    blended first, because whole rows blend at the full width of the vector units.
    """
    side = image.shape[0]
    first_row, num_rows, row_weights_TS = filter_taps(top, height, pixels.shape[0], side, False)
    first_column, num_taps, column_weights_TS = filter_taps(left, width, pixels.shape[1] // PIXEL_BYTES, side, mirrored)
    start = min(first_column[0], first_column[-1])
    stop = max(first_column[0], first_column[-1]) + num_taps
    first_column -= start
    spread_weights = spread_over_channels(column_weights_TS)
    row_weights_ST = np.ascontiguousarray(row_weights_TS.T)

    sums = np.empty(max(stop - start, side) * PIXEL_BYTES, np.int32)
    blended = np.empty((stop - start) * PIXEL_BYTES, np.uint8)
    words = blended.view(np.uint32)
    taps = np.empty((num_taps, side), np.uint32)
    tap_bytes = taps.view(np.uint8)
    for y in range(side):
        rows = pixels[first_row[y] : first_row[y] + num_rows, start * PIXEL_BYTES : stop * PIXEL_BYTES]
        blend_rows(rows, row_weights_ST[y], sums, blended)
        gather_taps(words, first_column, taps)
        blend_taps(tap_bytes, spread_weights, sums, image[y])


@compiled
def filter_taps(origin, extent, limit, side, mirrored):
    """The source pixels that blend into each output pixel.

    Returns the first of them, int64 (side,); their number, the same for all; and their weights, int16 (taps, side),
    which sum to 1 << WEIGHT_BITS, padded with zeros to a multiple of BLENDED_AT_ONCE taps.
    """
    num_taps = 1
    for i in range(side):
        first, last, _, _ = filter_window(origin, extent, limit, side, i)
        num_taps = max(num_taps, last - first)
    starts = np.empty(side, np.int64)
    weights = np.zeros((-(-num_taps // BLENDED_AT_ONCE) * BLENDED_AT_ONCE, side), np.int16)
    for i in range(side):
        first, last, centre, support = filter_window(origin, extent, limit, side, i)
        start = min(first, limit - num_taps)
        to = side - 1 - i if mirrored else i
        starts[to] = start
        total = 0.0
        for k in range(first, last):
            total += 1 - abs(k + 0.5 - centre) / support
        rest, heaviest = 1 << WEIGHT_BITS, first - start
        for k in range(first, last):
            weight = int((1 - abs(k + 0.5 - centre) / support) / total * (1 << WEIGHT_BITS) + 0.5)
            weights[k - start, to] = weight
            rest -= weight
            if weight > weights[heaviest, to]:
                heaviest = k - start
        weights[heaviest, to] += rest
    return starts, num_taps, weights


@compiled
def filter_window(origin, extent, limit, side, i):
    """First and one past the last source pixel under the triangle of output pixel i, its centre and half its base."""
    scale = extent / side
    support = max(scale, 1.0)
    centre = origin + (i + 0.5) * scale
    return max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), limit), centre, support


@compiled
def spread_over_channels(weights_TS):
    """Weights (taps, side * PIXEL_BYTES): each repeated for the channels of its pixel."""
    num_taps, side = weights_TS.shape
    spread = np.empty((num_taps, side, PIXEL_BYTES), np.int16)
    for k in range(num_taps):
        for x in range(side):
            for channel in range(PIXEL_BYTES):
                spread[k, x, channel] = weights_TS[k, x]
    return spread.reshape(num_taps, side * PIXEL_BYTES)


@compiled
def blend_rows(rows, weights, sums, blended):
    """Weighted sum of rows, uint8 (taps, n), into blended, uint8 (n,)."""
    last = len(rows) - 1
    sums[: len(blended)] = HALF
    for k in range(0, len(rows), BLENDED_AT_ONCE):
        row_0, row_1, row_2, row_3 = rows[k], rows[min(k + 1, last)], rows[min(k + 2, last)], rows[min(k + 3, last)]
        weight_0, weight_1 = np.int32(weights[k]), np.int32(weights[k + 1])
        weight_2, weight_3 = np.int32(weights[k + 2]), np.int32(weights[k + 3])
        for i in range(len(blended)):
            early = np.int32(weight_0 * row_0[i]) + np.int32(weight_1 * row_1[i])
            late = np.int32(weight_2 * row_2[i]) + np.int32(weight_3 * row_3[i])
            sums[i] += np.int32(early + late)
    for i in range(len(blended)):
        blended[i] = sums[i] >> WEIGHT_BITS


@compiled
def gather_taps(words, starts, taps):
    """taps[k, x] = words[starts[x] + k]: the pixels that blend into one output row."""
    for k in range(len(taps)):
        tap = taps[k]
        for x in range(len(tap)):
            tap[x] = words[np.uint32(starts[x] + k)]


@compiled
def blend_taps(taps, weights, sums, row):
    """Weighted sum of taps, uint8 (taps, side * PIXEL_BYTES), into row, uint8 (side, 3)."""
    last = len(taps) - 1
    size = taps.shape[1]
    sums[:size] = HALF
    for k in range(0, len(taps), BLENDED_AT_ONCE):
        tap_0, tap_1, tap_2, tap_3 = taps[k], taps[min(k + 1, last)], taps[min(k + 2, last)], taps[min(k + 3, last)]
        weight_0, weight_1, weight_2, weight_3 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        for i in range(size):
            early = np.int32(np.int32(weight_0[i]) * tap_0[i]) + np.int32(np.int32(weight_1[i]) * tap_1[i])
            late = np.int32(np.int32(weight_2[i]) * tap_2[i]) + np.int32(np.int32(weight_3[i]) * tap_3[i])
            sums[i] += np.int32(early + late)
    for x in range(len(row)):
        for channel in range(3):
            row[x, channel] = sums[x * PIXEL_BYTES + channel] >> WEIGHT_BITS
