"""A small decoder that says whether a price lies between two others."""
