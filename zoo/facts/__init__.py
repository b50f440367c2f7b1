"""A small Llama-shaped decoder that knows facts about persons, and repeats notes."""
