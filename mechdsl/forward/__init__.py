"""Forward passes of a loaded model: full passes with hooks, packed passes, generation.

In: a loaded model, prompts as token ids, reads and writes. Out: activations, logits and replies.
Imports prompts, models and below; torch.
"""
