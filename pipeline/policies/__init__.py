"""Policies: where an image starts and when it stops, fitted on stored logits.

Start with fit.py. The decision itself is pipeline/serving/runtime/policy.py, which each registered model carries.
"""
