"""Write a trained network as an MLflow model that needs neither this project nor pickle, and classify files with it."""

from __future__ import annotations

import io
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from PIL import Image

from pipeline.serving import pyfunc, runtime
from pipeline.serving.export import export_model
from pipeline.serving.runtime.images import MAX_BYTES
from pipeline.training.checkpoint import LoadedModel

REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "pillow")
_OUTPUT_TYPES = {"Int64": "long", "Float64": "double", "string": "string"}
_RUNTIME = Path(runtime.__path__[0])


def save_pyfunc(loaded: LoadedModel, folder: Path, policies: Mapping[str, Any] | None = None) -> None:
    """Write an MLflow model: exported programs, their description, the code that runs them, and pyfunc.py.

    Args:
        policies: as in `export_model`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        programs = Path(temporary) / pyfunc.FOLDER_ARTIFACT
        programs.mkdir()
        export_model(loaded, programs, policies)
        write_code(programs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from pandas, about how MLflow reads the example
            mlflow.pyfunc.save_model(
                folder,
                python_model=pyfunc.__file__,
                artifacts={pyfunc.FOLDER_ARTIFACT: str(programs)},
                model_config=pyfunc.PLACEMENT,
                signature=_signature(),
                input_example=_example(loaded.model.sides[0]),
                pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
            )


def write_code(folder: Path) -> None:
    """Copy the package that runs the programs into `folder`."""
    shutil.copytree(_RUNTIME, folder / pyfunc.CODE_FOLDER, ignore=shutil.ignore_patterns("__pycache__"))


def code_files() -> list[Path]:
    """Return every source file that is stored with a model."""
    return [Path(pyfunc.__file__), *sorted(_RUNTIME.glob("*.py"))]


def _signature() -> ModelSignature:
    outputs: list[ColSpec | TensorSpec] = [
        ColSpec(_OUTPUT_TYPES[kind], name, required=name == "gflops") for name, kind in pyfunc.OUTPUT_COLUMNS.items()
    ]
    params = ParamSchema([ParamSpec(name, "double", default) for name, default in pyfunc.PARAMS.items()])
    # Images arrive as base64 text over HTTP. MLflow's server would decode a binary column in some request formats only,
    # and one bad image would fail the whole request. A string column passes any value unchanged, bytes and arrays too.
    return ModelSignature(Schema([ColSpec("string", pyfunc.IMAGE_COLUMN)]), Schema(outputs), params)


def _example(side: int) -> pd.DataFrame:
    """Return the example input: one gray JPEG."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (128, 128, 128)).save(buffer, "JPEG")
    return pd.DataFrame({pyfunc.IMAGE_COLUMN: [buffer.getvalue()]})


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
    with ThreadPoolExecutor(8) as readers:
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
    """Return the file's bytes or, as text, the reason why it cannot be used. A file that is too large is not read."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            return f"the file has {size:,} bytes; at most {MAX_BYTES:,} are allowed"
        return path.read_bytes()
    except OSError as error:
        return str(error)
