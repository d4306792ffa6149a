"""Training: the three stages, what a step of each computes, checkpoints and logit tables. It runs without Ray.

Start with `loop.py`, which trains the stages in order, then read `objectives.py`, the losses.
"""
