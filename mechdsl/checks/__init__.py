"""Every check that needs no run: `mechdsl validate`.

In: the text of a file. Out: resolved experiments, or diagnostics. Imports rules and below; no
torch, and numpy only for generated images.
"""
