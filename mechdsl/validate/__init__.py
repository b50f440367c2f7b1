"""Everything that can be refused without running: `mechdsl validate`.

In: the text of a file. Out: resolved experiments, or diagnostics. Imports resolve and below, and
neither torch nor numpy.
"""
