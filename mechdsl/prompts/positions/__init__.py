"""Positions of the language, as token positions in the rows of a table."""
