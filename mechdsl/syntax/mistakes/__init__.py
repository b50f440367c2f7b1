"""What is said about a text that doesn't parse.

In: a text and the place where the parser stopped. Out: the statements that are good, and
diagnostics that say what to write. Imports syntax and below.
"""
