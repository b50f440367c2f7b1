"""A small vision transformer that says which shape an image shows."""
