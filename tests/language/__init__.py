"""`docs/language.md`, which `python -m tests.language --write` generates from the registries."""
