"""Rows of Parquet files whose images are in a column: Hugging Face's struct of bytes and path, or plain bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow import Schema


def image_column(schema: Schema) -> str:
    """Return the column that has the bytes of images, as Parquet addresses it: `image.bytes`, or `image`.

    Raises:
        ValueError: there is no such column, or there are several and none of them is called image.
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


ROWS_AT_A_TIME, BUFFER_BYTES = 8, 1 << 20


def read_rows(path: str, row_group: int, rows: Sequence[int]) -> tuple[list[bytes | None], int]:
    """Return the images in `rows` of a Parquet file, all of one row group, and the file's modification time (ns).

    An image is None if its row has none. The row group is decoded a few rows at a time, in memory that stays in the
    processor's cache, and only the wanted rows are kept.

    Raises:
        OSError: the file, or this row group, cannot be read.
    """
    import pyarrow as pa
    from pyarrow import parquet

    found: dict[int, bytes | None] = {}
    wanted = set(rows)
    try:
        with parquet.ParquetFile(path, buffer_size=BUFFER_BYTES) as file:
            modified = Path(path).stat().st_mtime_ns
            row = sum(file.metadata.row_group(before).num_rows for before in range(row_group))
            columns = [image_column(file.schema_arrow)]
            for batch in file.iter_batches(ROWS_AT_A_TIME, row_groups=[row_group], columns=columns, use_threads=False):
                column = batch.column(0)
                images = column.flatten()[0] if pa.types.is_struct(column.type) else column
                found |= {row + n: images[n].as_py() for n in range(len(images)) if row + n in wanted}
                row += len(images)
            return [found[row] for row in rows], modified
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(os.strerror(error.errno)) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f"row group {row_group} of {Path(path).name} cannot be read: {reason}") from None
