"""Read batches from a beton: the same crop of each image at every resolution, reproducible to the bit.

Start with loader.py; order.py decides which sample comes when, kernels.py decodes and resizes.
"""
