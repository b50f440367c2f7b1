"""A small decoder that answers questions, and refuses some of them."""
