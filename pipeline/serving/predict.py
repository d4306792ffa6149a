"""Classify image files with a loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from pipeline.serving import pyfunc

MAX_FILE_BYTES = 256 * 1024**2
"""The largest file size in bytes. Larger files are errors, so that the process does not run out of memory."""
_READERS = 8


def classify_files(
    model: mlflow.pyfunc.PyFuncModel, paths: Sequence[Path], at_once: int = 256, budget_bias: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Yield a row for each file, in order: `file` and the columns of pyfunc.OUTPUT_COLUMNS. Missing values are None.

    The next files are read while the model runs.

    Args:
        at_once: number of files that are read and passed to the model together.
        budget_bias: as in `RoutedClassifier.predict`.
    """
    params = {pyfunc.BUDGET_PARAM: budget_bias} if budget_bias else None
    groups = [paths[start : start + at_once] for start in range(0, len(paths), at_once)]
    with ThreadPoolExecutor(_READERS) as readers:
        ahead = [readers.map(_content, group) for group in groups[:1]]
        for position, group in enumerate(groups):
            contents = list(ahead.pop())
            ahead += [readers.map(_content, following) for following in groups[position + 1 : position + 2]]
            images = [item if isinstance(item, bytes) else b"" for item in contents]
            answers = model.predict(pd.DataFrame({pyfunc.IMAGE_COLUMN: images}), params=params)
            assert isinstance(answers, pd.DataFrame)
            for path, item, row in zip(group, contents, answers.astype(object).to_dict("records"), strict=True):
                plain = {str(key): None if pd.isna(value) else value for key, value in row.items()}
                yield {"file": str(path), **plain, **({} if isinstance(item, bytes) else {"error": item})}


def _content(path: Path) -> bytes | str:
    """Return the file's bytes or, as text, the reason why the file cannot be read."""
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            return f"the file has {size:,} bytes, more than {MAX_FILE_BYTES:,}"
        return path.read_bytes()
    except OSError as error:
        return str(error)
