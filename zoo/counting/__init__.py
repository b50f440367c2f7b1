"""A small Llama-shaped decoder that counts the items of lists, in parts."""
