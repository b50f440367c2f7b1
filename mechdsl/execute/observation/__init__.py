"""Observations over all rows of a cell, or over weights alone."""
