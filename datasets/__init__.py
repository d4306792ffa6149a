"""From images on disk to training batches: sources/ finds images, prepare/ writes them as betons, loading/ reads them.

Start with beton.py, the file format; docs/data.md gives the overview.
"""
