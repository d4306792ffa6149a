"""MLflow tracking: one run for each training run, its local journal, and the model registry.

Start with tracker.py (runs), registry.py (models) and promotion.py (aliases); store.py checks the address.
"""

import logging
import os

# MLflow reads most of these at each call, the last two at import. With its defaults, one call to a server that is down
# takes four minutes, loading a model may run a pickle, and usage data is sent to the MLflow project.
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# Otherwise each retry of a call logs a line. This project reports an unreachable server once.
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
# This logger only warns, when a model is saved, that an environment made by uv has no pip.
logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
