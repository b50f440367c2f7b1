"""A plan executed on its models: unpatched runs, patched rows, and metrics read from them.

In: a `Plan` and loaded models. Out: `MeasuredValues` for every cell and prompt. Imports forward,
planner, rules and below; torch.
"""
