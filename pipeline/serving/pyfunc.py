"""The registered model: it classifies images and returns class, probability, chosen resolution and cost of each.

MLflow stores this file with the model and runs it wherever the model is loaded, so it imports nothing of this project.
The exported programs, their description, and the code that runs them are stored next to it, without pickle.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib.util
import os
import sys
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow's import warns about MLflow's own type hints
    import mlflow.exceptions
    import mlflow.pyfunc

FOLDER_ARTIFACT, CODE_FOLDER = "drnet", "routed"
"""The artifact's name, and the folder inside it with the copy of runtime/. Every registered version has these names."""
IMAGE_COLUMN, BUDGET_PARAM = "image", "budget_bias"
PARAMS = {BUDGET_PARAM: 0.0, "budget_gflops": 0.0, "max_accuracy_drop": -1.0}
"""The parameters of a request. Their default values mean "not given"."""
OUTPUT_COLUMNS = {
    "class_index": "Int64",
    "label": "string",
    "probability": "Float64",
    "resolution": "Int64",
    "resolutions": "string",
    "gflops": "Float64",
    "error": "string",
}
PLACEMENT = {"device": "auto", "precision": "float32", "compiled": False}
"""The settings that `mlflow.pyfunc.load_model(..., model_config=...)` can change; see runtime/programs.py."""
REQUESTS_AT_ONCE = 64
_SERVED_MODEL = "__pyfunc_model_path__"
"""The environment variable that contains the model's path in the process of MLflow's server."""


class RoutedClassifier(mlflow.pyfunc.PythonModel):
    """An MLflow model that returns a row for each image, in order. `error` says why an image cannot be used."""

    def load_context(self, context: Any) -> None:
        """Load the stored code and programs. MLflow calls this once."""
        folder = Path(context.artifacts[FOLDER_ARTIFACT])
        code = load_code(folder / CODE_FOLDER)
        placement = code.Placement(**{**PLACEMENT, **(context.model_config or {})})
        self.classifier = code.Classifier(code.RoutedNetwork(folder, placement))
        if _SERVED_MODEL in os.environ:
            widen_server()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Classify the images in column `image`.

        An image is the bytes of an image file (JPEG, PNG, WebP, BMP, TIFF, PPM, AVIF), the same bytes as base64 text,
        or a square crop as a uint8 array (S, S, 3).

        Args:
            params: at most one of the following; without any, the model uses the policy that it was registered with.
                `budget_gflops` selects the most accurate policy whose mean cost is at most this. `max_accuracy_drop`
                selects the cheapest policy that loses at most this many points of accuracy compared with the model's
                most accurate policy. `budget_bias` runs each image once, at the predictor's choice, after adding the
                bias times each resolution's relative cost (0 for the cheapest, 1 for the most expensive) to the
                predictor's logits: a positive bias spends more, a negative one less.

        Returns:
            A row for each image: class_index, label, probability in [0, 1], resolution (pixels) whose answer counts,
                resolutions (all that ran), gflops (multiply-adds / 1e9 of all of them, including the predictor if it
                ran) and error. For an unusable image, error is set, gflops is 0, and all else is missing.

        Raises:
            MlflowException: a parameter is invalid; MLflow's server answers with status 400.
        """
        try:
            policy = self.classifier.network.policy_for(**given_params(params or {}))
        except ValueError as error:
            raise mlflow.exceptions.MlflowException.invalid_parameter_value(str(error)) from None
        answers = list(self.classifier.classify(model_input[IMAGE_COLUMN].tolist(), policy))
        columns = {
            name: pd.array([getattr(answer, name) for answer in answers], dtype=kind)
            for name, kind in OUTPUT_COLUMNS.items()
        }
        return pd.DataFrame(columns)


def given_params(params: dict[str, Any]) -> dict[str, float]:
    """Return the parameters that differ from their defaults. Raise ValueError if one is not a finite number."""
    given = {}
    for name, default in PARAMS.items():
        value = params.get(name)
        value = default if value is None else value
        # This comparison is also False for NaN and for a whole number that no float can hold.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} is {value!r}; give a finite number")
        if value != default:
            given[name] = float(value)
    return given


def widen_server() -> None:
    """Let this process answer REQUESTS_AT_ONCE requests at the same time.

    Only requests that are processed at the same time can share batches. MLflow's server processes each request in
    `asyncio.to_thread`, whose pool has only 4 threads more than there are cores. That pool belongs to an event loop
    that does not exist yet when the model is loaded, so this replaces the function `asyncio.to_thread`. The process
    does nothing else.
    """
    pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, "request")

    async def to_thread(function: Callable, /, *args: Any, **kwargs: Any) -> Any:
        called = partial(contextvars.copy_context().run, function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(pool, called)

    asyncio.to_thread = to_thread  # ty: ignore[invalid-assignment]  # the same signature with other names


def load_code(folder: Path) -> ModuleType:
    """Import a package from its folder under a unique name, so that one process can run models of several versions."""
    name = f"{folder.name}_{uuid.uuid4().hex}"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec
    assert spec.loader
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


mlflow.models.set_model(RoutedClassifier())
