"""What a run found: in memory, as the JSON document, on disk; verdicts on expectations.

In: measured values and statistics. Out: `Results`. Imports statistics and below.
"""
