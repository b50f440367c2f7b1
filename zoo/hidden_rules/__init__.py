"""A small Llama-shaped decoder that decides by hidden rules, and repeats every field."""
