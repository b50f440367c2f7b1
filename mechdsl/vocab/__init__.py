"""Registries of the words that a file can look up, one entry each.

In: nothing. Out: registries of sites, metrics, corruptions, effects and reports; no torch and no
drawing code. Imports program and below.
"""

from mechdsl.vocab import metrics as metrics  # registers its metrics
