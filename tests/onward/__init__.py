"""Tests of derived experiments, which use results of other experiments."""
