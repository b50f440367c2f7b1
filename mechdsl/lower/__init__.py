"""From syntax trees to the typed `Program`: imports, names of the file, what is not supported."""

from mechdsl.lower.program import lower_program

__all__ = ["lower_program"]
