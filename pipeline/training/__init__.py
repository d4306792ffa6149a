"""Training: three stages, what a step of each computes, checkpoints and logit tables; runs without Ray.

Start with `loop.py`, which trains the stages in order, then `objectives.py`, the losses.
"""
