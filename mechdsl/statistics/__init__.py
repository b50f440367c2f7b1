"""From values of prompts to means, intervals and p.

In: arrays over cells and prompts. Out: `CellStatistics`, null bands, intervals. Imports validate
and below; numpy and scipy.
"""
