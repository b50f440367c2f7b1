"""Packed forward passes of patched rows: no padding, and only changed tokens are computed."""
