"""A small GPT-2-shaped decoder that says who gets something, and what colour things are."""
