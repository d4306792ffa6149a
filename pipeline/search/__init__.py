"""The search for predictors with the best accuracy for their cost, for one trained backbone.

Start with driver.py, which runs a search from checks to report; trial.py trains one candidate, tuner.py picks the next.
"""
