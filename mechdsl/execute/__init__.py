"""A plan run on its models: unpatched runs, patched rows, metrics read off them.

In: a `Plan` and loaded models. Out: `MeasuredValues` for every cell and prompt. Imports
generate and below; torch.
"""
