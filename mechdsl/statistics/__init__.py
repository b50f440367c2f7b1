"""Statistics of measured values: means, intervals, p-values and null bands.

In: arrays over cells and prompts. Out: `CellStatistics`, null bands, intervals. Imports vocab and
below; numpy and scipy.
"""
