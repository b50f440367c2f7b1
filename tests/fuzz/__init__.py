"""Hostile files: whatever stands in one, the answer is a diagnostic or success."""
