"""Small changes to the package that its tests must detect; see `__main__`."""
