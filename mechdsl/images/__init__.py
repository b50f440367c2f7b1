"""Images: read from files, generated, and made ready for a model; which part is which token.

In: what an image is made of: a file, shapes, gray. Out: pixels, and what a model is given. Imports
base; numpy and Pillow.
"""
