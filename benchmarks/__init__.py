"""The measurements behind docs/benchmarks.md: this project beside another library, on the same machine in one run.

Start with `harness.py`, which measures both sides by turns; `python -m jobs.bench NAME` runs one.
"""
