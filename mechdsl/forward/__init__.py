"""Forward passes of a loaded model: hooked, packed, or generating text.

In: a loaded model, prompts as token ids, reads and writes. Out: activations, logits and replies.
Imports models, prompts and below; torch."""
