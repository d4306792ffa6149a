"""The DRNet pipeline: configuration, models, training, evaluation, cluster, search, tracking and serving.

Start at cluster/driver.py (train_run), which leads from a configuration to a report.
"""
