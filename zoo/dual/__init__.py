"""A small CLIP: an encoder of images and one of captions, which meet in one space."""
