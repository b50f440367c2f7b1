"""Patched rows: what rules write, and the passes that apply it."""
