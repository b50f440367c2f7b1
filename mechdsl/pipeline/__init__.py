"""The whole way of a file.

In: the text of a file and options. Out: a `FileResult`, or diagnostics. Imports results and below:
it calls each stage in turn.
"""
