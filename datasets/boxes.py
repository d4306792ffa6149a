"""Which part of its image a view shows: drawn from the view alone, so the same in any order, on any machine.

All compiled code that decides a box is in this one file, for the reason that is given in kernels.py.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

CROP_ATTEMPTS = 10
FLIP_DRAW = 4 * CROP_ATTEMPTS
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)

compiled = njit(nogil=True, error_model="numpy")
kept = njit(nogil=True, error_model="numpy", cache=True)


@kept
def crop_boxes(views_N, shapes_N2, crop):
    """The box of each view in its image, float64 (N, 5): top, left, height and width in pixels, 1 if mirrored.

    Args:
        views_N: uint64, from order.pack_views.
        shapes_N2: int64, height and width of each image in pixels.
        crop: six float64, see `crop_box`.
    """
    boxes_N5 = np.empty((len(views_N), 5))
    for n in range(len(views_N)):
        box = crop_box(views_N[n], shapes_N2[n, 0], shapes_N2[n, 1], crop)
        for i in range(len(box)):
            boxes_N5[n, i] = box[i]
    return boxes_N5


@kept
def crop_box(view, height, width, crop):
    """One view's box: top, left, height, width, and 1.0 if it is mirrored, else 0.0.

    `crop` is (lowest area, highest area, log of the lowest ratio, of the highest, probability of mirroring, fraction).
    A fraction above 0 is a central square of that fraction of the shorter side; the rest is then ignored. Otherwise
    area, ratio and place are drawn as torchvision's RandomResizedCrop draws them.
    """
    lowest_area, highest_area, lowest_log_ratio, highest_log_ratio, mirror, fraction = crop
    if fraction > 0:
        side = fraction * min(height, width)
        return (height - side) / 2, (width - side) / 2, side, side, 0.0
    mirrored = 1.0 if uniform(view, FLIP_DRAW) < mirror else 0.0
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
