"""Everything that can be refused without running: `mechdsl validate`.

In: the text of a file. Out: resolved experiments, or diagnostics. Imports rules and below; no
torch, and numpy for images of shapes alone.
"""
