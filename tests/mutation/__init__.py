"""Small changes to the package that its tests have to notice; see `__main__`."""
