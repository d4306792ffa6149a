"""Serving: export and package a trained model, run it, and answer HTTP requests with it.

Start with pyfunc.py, which MLflow loads and calls; runtime/ runs the programs that export.py writes.
"""
