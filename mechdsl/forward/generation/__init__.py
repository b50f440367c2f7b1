"""Texts that a model writes behind its prompts, while rules act.

In: prompts as token ids, what is written into which pass, how tokens are chosen. Out: a reply for
each prompt. Imports hooks and below; torch.
"""
