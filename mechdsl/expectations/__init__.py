"""`expect`: conditions on effects, decided on confidence intervals.

`conditions` are the typed form of a condition, `check` reads them from the syntax tree (before
anything is run), `evaluate` decides them on a finished experiment.
"""

from mechdsl.expectations.check import Known, KnownMeasure, check_expectation

__all__ = ["Known", "KnownMeasure", "check_expectation"]
