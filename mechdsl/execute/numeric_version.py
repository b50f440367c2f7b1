"""Which numbers the executor makes: values that are kept between runs hang on it."""

NUMERIC_VERSION = 5
"""To be raised by hand with every change after which some file gives other numbers, beyond the
last bits: then nothing of before is read from a store. A test of the store says when that is."""
