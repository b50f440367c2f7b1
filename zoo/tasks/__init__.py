"""A small decoder that does with a word what the examples before it do."""
