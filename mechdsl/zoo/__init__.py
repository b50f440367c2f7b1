"""Tiny models trained by scripts in this repository and shipped as package data."""
