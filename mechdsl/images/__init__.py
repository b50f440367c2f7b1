"""Pixels: images that are generated, with masks of what they show.

In: a kind of shape and a seeded generator. Out: pixels, uint8 [height, width, 3], and
masks of them. Imports nothing of the package; numpy.
"""
