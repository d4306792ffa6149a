"""Measurements of this project against its peers on the same machine, for `python -m jobs.bench NAME`.

Start with harness.py, which compares two sides. Each other module is one bench with a `run` function, or a tool.
"""
