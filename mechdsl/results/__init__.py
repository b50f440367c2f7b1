"""Results of runs: in memory, as the JSON document, on disk; verdicts on expectations.

In: measured values and statistics. Out: `Results`. Imports statistics, execute, checks and below.
"""
