"""Policies: at which resolution an image starts and when it stops. They are fitted on stored logits.

Start with fit.py. The decision itself is pipeline/serving/runtime/policy.py, which is stored with each model.
"""
