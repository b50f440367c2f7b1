"""A small Llama-shaped decoder that continues repeated sequences of words."""
