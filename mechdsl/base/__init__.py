"""What everything stands on: source files and spans, registries, records, arrays.

In: nothing. Out: small types without meaning of their own. Imports nothing of the package.
"""
