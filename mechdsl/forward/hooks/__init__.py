"""Whole passes of a loaded model, with activations read and written: the plain way.

In: a loaded model, a batch of token ids, reads and writes. Out: activations and logits. Imports
prompts and below; torch.
"""
