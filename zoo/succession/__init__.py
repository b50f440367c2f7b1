"""A small decoder that names the successor of a number, a month, a day or a letter."""
