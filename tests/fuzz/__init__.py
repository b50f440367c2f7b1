"""Hostile files: for any content, commands report diagnostics or succeed."""
