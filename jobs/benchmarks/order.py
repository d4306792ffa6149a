"""bench order: random against quasi-random order for a beton larger than memory, with a cold page cache."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets.beton import TRAIN, beton_path
from datasets.beton_file import PAGE_SIZE
from datasets.prepare import prepare
from jobs.benchmarks.harness import Row, Side, compare
from jobs.benchmarks.photographs import write_photographs

NUM_IMAGES = 6144
TIMES_MEMORY = 4  # how many times the memory the beton is
RANKS = (1, 2)
SIDES_FILE = "jobs.benchmarks.order_sides"


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """All rows of the table, and notes on them."""
    with TemporaryDirectory(prefix="bench-order-") as scratch, ExitStack() as stack:
        data = Path(scratch) / "data"
        prepare(
            "imagefolder",
            data,
            source=write_photographs(Path(scratch) / "images", images, NUM_IMAGES),
            validation_fraction=0.01,
        )
        beton = beton_path(data, TRAIN)
        memory = beton.stat().st_size // TIMES_MEMORY
        window = max(1, memory // PAGE_SIZE // 2)  # the one in use and the one that is fetched

        def side(name: str, world_size: int, window_pages: int | None) -> Side:
            arguments = {"beton": str(beton), "memory": memory, "world_size": world_size, "window_pages": window_pages}
            return stack.enter_context(Side(f"{SIDES_FILE}:{name}", arguments | {"threads": threads}, threads))

        rows = []
        for world_size in RANKS:
            of = f"rank 0 of {world_size}"
            for side_name, what in (("decoded", "decoded to 224"), ("read", "read only")):
                ours, peer = side(side_name, world_size, window), side(side_name, world_size, None)
                name = f"{what}, {of}, windows against random order"
                rows.append(compare(name, "images/s", ours.measure, peer.measure, runs))
    pages = memory * TIMES_MEMORY // PAGE_SIZE
    return rows, [
        f"{threads} threads, a beton of {pages} pages, memory for {memory // PAGE_SIZE}, windows of {window}",
        f"two images of a batch lie in the same page with probability 1/{window} in windows, 1/{pages} in random order",
        "memory is limited by dropping the page cache whenever so much was read since it was dropped last",
    ]
