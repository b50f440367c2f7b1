"""Metrics and observations read from a run, and the measured values of an experiment."""
