"""Entry points: `python -m jobs.NAME --config CONFIG [key.path=value ...]`, or the same behind `ray job submit`."""

import importlib.util
from pathlib import Path


def _require_own_datasets() -> None:
    """Stop when Hugging Face's `datasets`, or any other package of that name, would be imported in place of ours."""
    ours = Path(__file__).resolve().parent.parent / "datasets"
    spec = importlib.util.find_spec("datasets")
    found = Path(spec.origin).resolve().parent if spec and spec.origin else None
    if found != ours:
        raise SystemExit(
            f"error: `import datasets` finds {found}, not this project's folder {ours}.\n"
            f"Run from the project's root (cd {ours.parent} && python -m jobs.NAME ...), with nothing before it on "
            "PYTHONPATH that holds a package named `datasets` (Hugging Face's has the same name)."
        )


_require_own_datasets()
