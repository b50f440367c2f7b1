"""`docs/language.md`: written from the registries by `python -m tests.language --write`."""
