"""The syntax of a file: parser, syntax tree, formatter, and messages about syntax errors.

In: the text of a file. Out: a tree of frozen records with spans, and diagnostics; no text raises an
exception. Imports diagnostics and below.
"""
