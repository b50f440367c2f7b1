"""Diagnostics for text that doesn't parse, and recovery of the valid statements."""
