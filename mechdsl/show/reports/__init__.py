"""Reports, one module each: `render` for the terminal, `save` for files.

In: the result of an experiment and a `report` line. Out: text or a file. Imports results and below.
"""
