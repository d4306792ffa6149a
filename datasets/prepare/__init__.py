"""Turn the images of a source into a prepared folder: checked, resized JPEGs in betons, and a manifest.

Start with prepare.py; build.py writes the betons and convert.py handles one image.
"""
