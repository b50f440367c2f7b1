"""Runs a file: checks, computation, results, and the Python functions that do the same.

In: the text of a file and options, or the file and models that Python passes. Out: a `FileResult`,
`Results`, text or diagnostics. Imports show and below: it calls each stage in turn.
"""
