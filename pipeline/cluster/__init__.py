"""Train, evaluate and predict on Ray.

Start reading in driver.py, which runs a training from start to end, then worker.py.
"""
