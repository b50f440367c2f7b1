"""Transplants, attention edits and path patching, held to what is worked out by hand."""
