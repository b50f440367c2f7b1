"""Files with one slip each, and what is said about them."""
