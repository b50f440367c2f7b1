"""Checks that prove a model's anatomy on a few tokens."""
