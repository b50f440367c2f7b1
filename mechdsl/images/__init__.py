"""Images and sounds: files and generated ones, rendered and prepared for a model.

In: the description of an image or a sound: a file, shapes, a uniform gray or a tone. Out: pixels or
samples, the input of a model, and the part of an image that each token reads. Imports base; numpy
and Pillow.
"""
