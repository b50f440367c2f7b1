"""Verdicts on expectations: estimates, the values that an expectation names, and decisions."""
