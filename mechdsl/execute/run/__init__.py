"""A plan run from start to end, and its `save` lines."""
