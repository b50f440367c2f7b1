"""Whole files run end to end and held to interventions written by hand."""
