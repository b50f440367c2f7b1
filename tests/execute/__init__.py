"""Whole files, run end to end and compared with reference interventions."""
