"""Entry points: `python -m jobs.NAME --config CONFIG [key.path=value ...]`, also through `ray job submit`.

Start at train.py. cli.py has what all jobs share.
"""

import importlib.util
from pathlib import Path


def _require_own_datasets() -> None:
    """Exit with an error if `import datasets` would find another package of that name, such as Hugging Face's."""
    ours = Path(__file__).resolve().parent.parent / "datasets"
    spec = importlib.util.find_spec("datasets")
    found = Path(spec.origin).resolve().parent if spec and spec.origin else None
    if found != ours:
        raise SystemExit(
            f"error: `import datasets` finds {found}, not this project's folder {ours}.\n"
            f"Run from the project's root (cd {ours.parent} && python -m jobs.NAME ...), and remove packages that are "
            "also named `datasets`, such as Hugging Face's, from PYTHONPATH."
        )


_require_own_datasets()
