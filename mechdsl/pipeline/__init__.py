"""Runs of a file from text to results, and the Python API.

In: the text of a file and options, or a file and models passed from Python. Out: a `FileResult`,
`Results`, text or diagnostics. Imports show and below; it calls each stage in turn.
"""
