"""From text to the syntax tree and back.

In: the text of a file. Out: a tree of frozen records with spans, and diagnostics; a user's text
never raises. Imports diagnostics and below.
"""
