"""A small decoder that learned brackets first and sentences later."""
