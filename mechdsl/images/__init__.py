"""Images: files and generated shapes, rendered to pixels and prepared for a model.

In: the description of an image: a file, shapes or a uniform gray. Out: pixels, the input of a
model, and the part of an image that each token reads. Imports base; numpy and Pillow.
"""
