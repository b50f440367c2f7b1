"""From values of prompts to means, intervals and p.

In: arrays over cells and prompts. Out: `CellStatistics`, null bands, intervals. Imports vocab and
below; numpy and scipy.
"""
