"""Rows of Parquet files whose images are in a column: Hugging Face's struct of bytes and path, or plain bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow import Schema


def image_column(schema: Schema) -> str:
    """Return the column that has the bytes of images, as Parquet addresses it: `image.bytes`, or `image`.

    Raises:
        ValueError: there is none, or there are several and none of them is called image.
    """
    from pyarrow import types

    found = []
    for field in schema:
        kind, name = field.type, field.name
        if types.is_struct(kind) and (index := kind.get_field_index("bytes")) >= 0:
            kind, name = kind.field(index).type, f"{field.name}.bytes"
        if types.is_binary(kind) or types.is_large_binary(kind):
            found.append(name)
    named = [name for name in found if name in ("image", "image.bytes")]
    if len(found) > 1 and not named:
        raise ValueError(f"it has several columns of images, {' and '.join(found)}; call one of them image")
    if not found:
        raise ValueError(
            f"it has no column of images; its columns are {', '.join(schema.names)}; a column has the bytes of image "
            "files, or structs of bytes and path"
        )
    return (named or found)[0]


def read_rows(path: str, row_group: int, rows: Sequence[int]) -> tuple[list[Callable[[], bytes | None]], int]:
    """Read `rows` of a Parquet file, all of one row group; return functions that copy an image, and the file's time.

    A function returns None if its row has no image. The time is that of the last modification (ns).

    Raises:
        OSError: the file, or this row group, cannot be read.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            modified = Path(path).stat().st_mtime_ns
            first = sum(file.metadata.row_group(before).num_rows for before in range(row_group))
            table = file.read_row_group(row_group, columns=[image_column(file.schema_arrow)], use_threads=False)
            column = table.column(0)
            if 2 * len(rows) < len(column):
                # Keep the few that are wanted, not the whole row group.
                column, rows, first = column.take([row - first for row in rows]), range(len(rows)), 0
            # Not combine_chunks, which copies all images, nor copies of all at once, which new memory makes slow.
            parts = column.chunks
            images = [one for part in parts for one in (part.flatten()[0] if pa.types.is_struct(part.type) else part)]
            return [images[row - first].as_py for row in rows], modified
    except (pa.ArrowException, OSError, IndexError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(os.strerror(error.errno)) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f"row group {row_group} of {Path(path).name} cannot be read: {reason}") from None
