"""Small types that every package uses: source files and spans, registries, records, arrays.

In: nothing. Out: source spans, frozen records, digests, limits and text helpers. Imports nothing of
the package.
"""
