"""Evaluates a model: predictions at every resolution, statistics, and the report that compares routed and static.

Start with `predictions.py` (what is measured), then `report.py` (rows, comparisons, verdict).
"""
