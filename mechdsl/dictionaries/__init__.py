"""Dictionaries: sparse autoencoders and transcoders that other libraries trained.

In: a folder or a safetensors file. Out: the facts of its dictionary, and features of vectors.
Imports base; torch only in `features`.
"""
