"""The typed `Program` of a file: imports read, names bound, unsupported features reported.

In: the syntax trees of a file and its imports. Out: `spec.Program`, with every name of the file
bound. Imports syntax and below.
"""
