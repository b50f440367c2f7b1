"""Prompts: values to texts, texts to tokens, names to positions; no model needed.

In: a typed prompts block and a tokenizer. Out: a `PromptTable` of rows and runs, and positions in
it. Imports vocab and below.
"""
