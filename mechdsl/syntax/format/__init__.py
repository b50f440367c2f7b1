"""The canonical text of a file: `mechdsl fmt`.

In: a syntax tree. Out: its text, which parses to an equal tree. Imports syntax and below.
"""
