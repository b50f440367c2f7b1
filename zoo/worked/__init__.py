"""A small decoder that counts lists in parts, in steps that it writes or at once."""
