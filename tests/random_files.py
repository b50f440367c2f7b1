"""How many files that are drawn at random run: a few in `make test`, many in `make test-all`."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

QUIET = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large)


def few(examples: int) -> settings:
    """The same ones each time."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=QUIET
    )


def many(examples: int) -> settings:
    """Others each time; `MECHDSL_RANDOM_FILES` says another number of them."""
    number = int(os.environ.get("MECHDSL_RANDOM_FILES", examples))
    return settings(max_examples=number, deadline=None, suppress_health_check=QUIET)
