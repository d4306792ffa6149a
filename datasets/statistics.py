"""Mean and standard deviation of pixels by channel, from exact integer sums that can be added in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageStat

from datasets import turbojpeg

Channels = tuple[float, float, float]
ChannelSums = tuple[int, int, int]


@dataclass(frozen=True)
class PixelSums:
    """How many pixels there are, and the sums over them of the values (0 to 255) and their squares, by channel."""

    count: int = 0
    values: ChannelSums = (0, 0, 0)
    squares: ChannelSums = (0, 0, 0)

    def __add__(self, other: PixelSums) -> PixelSums:
        return PixelSums(
            self.count + other.count, _added(self.values, other.values), _added(self.squares, other.squares)
        )


def pixel_sums(jpeg: bytes) -> PixelSums:
    """The sums over all pixels of a sound JPEG, as RGB."""
    header = turbojpeg.read_header(jpeg)
    size, pixels = (header.width, header.height), turbojpeg.decode(jpeg, header)
    statistics = ImageStat.Stat(Image.frombuffer("RGB", size, pixels, "raw", "RGB", 0, 1))
    return PixelSums(statistics.count[0], _whole(statistics.sum), _whole(statistics.sum2))


def channel_statistics(sums: PixelSums) -> tuple[Channels, Channels]:
    """Mean and standard deviation by channel on a scale of 0 to 1, of at least one pixel."""
    mean, std = [], []
    for values, squares in zip(sums.values, sums.squares, strict=True):
        mean.append(round(values / sums.count / 255, 6))
        std.append(round((max(sums.count * squares - values**2, 0) ** 0.5) / sums.count / 255, 6))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _added(left: ChannelSums, right: ChannelSums) -> ChannelSums:
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]


def _whole(sums: Sequence[float]) -> ChannelSums:
    return int(sums[0]), int(sums[1]), int(sums[2])
