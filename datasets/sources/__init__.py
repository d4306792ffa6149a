"""The supported data sets. Find their images, labels and splits on disk, without reading the images.

Start with index.py, what every source returns; catalog.py lists the data sets.
"""
