"""The published experiments of `examples/systems`, and the page with their results."""
