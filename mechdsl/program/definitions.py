"""What the top-level statements of a file and its imports define."""

from __future__ import annotations

from dataclasses import dataclass, field

from mechdsl.base.source import Span
from mechdsl.program import spec
from mechdsl.program.constants import Constant
from mechdsl.syntax import ast


@dataclass
class Definitions:
    """What the top-level statements of all files have defined so far."""

    parameters: dict[str, Constant] = field(default_factory=dict)
    models: dict[str, spec.Model] = field(default_factory=dict)
    checkpoints: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the models that one with a `*` in its path stands for."""
    prompts: dict[str, spec.Prompts] = field(default_factory=dict)
    groups: dict[str, spec.Group] = field(default_factory=dict)
    directions: dict[str, spec.Direction] = field(default_factory=dict)
    metrics: dict[str, ast.Expr] = field(default_factory=dict)
    experiments: list[spec.Experiment] = field(default_factory=list)
    seed: int = 0
    seeded: Span | None = None
    """Where; a file's own seed comes after those of its imports and replaces them."""
