"""The words of the language that are looked up: one registered entry each.

In: nothing. Out: registries of sites, metrics, corruptions, effects and reports, without torch and
without drawing. Imports program and below.
"""

from mechdsl.vocab import metrics as metrics  # registers its metrics
