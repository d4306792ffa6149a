"""Rewrite the golden curve: `python -m tests.golden.renew`.

Run it after a change that is meant to change what training computes, and say in the commit why the curve moved. It
prints the largest relative difference to the old curve.
"""

from __future__ import annotations

import json

from datasets.files import write_whole
from tests.golden.curve import FILE, losses


def main() -> None:
    curve = losses()
    before = json.loads(FILE.read_text()) if FILE.exists() else {}
    for stage, values in curve.items():
        moved = [abs(new / old - 1) for new, old in zip(values, before.get(stage, []), strict=False)]
        print(f"{stage:<9} {len(values)} losses, moved by at most {max(moved, default=0.0):.2g}")
    write_whole(FILE, json.dumps(curve, indent=1) + "\n")


if __name__ == "__main__":
    main()
