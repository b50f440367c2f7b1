"""The words of the language that are looked up: one registered entry each."""
