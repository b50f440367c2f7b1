"""Images: read from files, generated, changed, and made ready for a model. NumPy and Pillow."""
