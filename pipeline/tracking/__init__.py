"""MLflow, and nothing else here: one run for a training run, a journal in between, the registry and what it serves."""

import logging
import os

# MLflow reads most of these at each call, the last two at its own import. With its defaults one call to a server that
# is down takes four minutes, loading a model may run a pickle, and usage is sent to its makers.
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# Each retry of a call is a line of its own otherwise; that a server is away is said once, by us.
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
# Its one warning when a model is saved is that an environment made by uv has no pip.
logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
