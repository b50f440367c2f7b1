"""Model families that need an entry; a new family is a class in one of these modules."""

from mechdsl.models.families import decoders, encoders, hybrids, vision
from mechdsl.models.shape import Family, find_family

__all__ = ["Family", "decoders", "encoders", "find_family", "hybrids", "vision"]
