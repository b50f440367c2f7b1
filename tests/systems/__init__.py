"""The published experiments of `examples/systems`, and the page that says what they found."""
