"""Images: files and generated shapes, rendered to pixels and prepared for a model.

In: the description of an image: a file, shapes or a uniform gray. Out: pixels, and the input of a
model. Imports base; numpy and Pillow.
"""
