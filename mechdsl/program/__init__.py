"""From syntax trees to the typed `Program`: imports, names of the file, what is not supported.

In: the syntax tree of a file and of those that it imports. Out: `spec.Program`, with every name of
the file bound. Imports syntax and below.
"""
