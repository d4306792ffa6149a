"""Evaluation: predictions at every resolution, statistics, and the report that compares routed and static networks.

Start with `predictions.py` (what is measured), then read `report.py` (rows, comparisons, verdict).
"""
