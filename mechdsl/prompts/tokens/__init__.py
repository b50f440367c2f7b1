"""Tokenizers and chat templates: texts and images to tokens."""
