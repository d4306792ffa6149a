"""The registered model: exporting and packaging it, the code that is stored with it, and classifying files.

Start with pyfunc.py, which MLflow loads and calls; runtime/ runs the programs that export.py writes.
"""
