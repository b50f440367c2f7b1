"""Differences of two runs: cells, inputs and verdicts."""
