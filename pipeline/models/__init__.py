"""The networks: backbones, resolution predictors, their batch norms, and their costs.

Start with `drnet.py`, the whole network, then read `backbone.py` and `predictor.py`.
"""
