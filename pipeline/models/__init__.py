"""The networks: backbones, resolution predictors, their batch norms and costs.

Start with `drnet.py`, the network as a whole, then `backbone.py` and `predictor.py`.
"""
