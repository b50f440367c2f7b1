"""A plugin: a rule kind, a metric, a corruption, a direction method and an estimator.

Modules that are slow to import (numpy, torch) are imported inside functions, so that `mechdsl
validate --plugin example` starts without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from mechdsl.program.direction_methods import FittedMethod, RowVectors, direction_method
from mechdsl.program.estimators import GradientEstimator, estimator
from mechdsl.program.spec import Constant
from mechdsl.resolve.types import ResolvedRule, VectorBatch
from mechdsl.rules.kinds import SiteRule, rule_kind
from mechdsl.syntax import ast
from mechdsl.syntax.tree_builder import ChangeSignature
from mechdsl.vocab.corruptions import CorruptibleRow, ValueChange, change
from mechdsl.vocab.metrics import metric

if TYPE_CHECKING:
    from torch import Tensor

    from mechdsl.base.arrays import Floats


@rule_kind("stretch")
class Stretch(SiteRule):
    """`stretch SITE at POSITIONS by NUMBER`: multiply the vectors by a number."""

    takes = "by"
    reads = "run"

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        read = vectors.read()
        return read * vectors.amounts[:, None].to(read)


@metric("centered_logit", takes="target", unit="logit")
def centered_logit(logits: Tensor, target: Tensor) -> Tensor:
    """Logit of a token minus the mean logit."""
    return logits.gather(-1, target.unsqueeze(-1)).squeeze(-1) - logits.mean(-1)


@change("reverse")
class Reverse(ValueChange[ast.ChangeLine]):
    """`reverse NAME`: write the words of a value in reverse order."""

    usage = "reverse fruits"
    meaning = "the words of this value in reverse order"
    signature = ChangeSignature((ast.Name,))

    def apply(self, row: CorruptibleRow, change: ast.ChangeLine) -> None:
        (name,) = change.values
        assert isinstance(name, ast.Name)
        value = row.plain_value(name)
        if not isinstance(value, str):
            row.refuse(name, "only a text has words", "name a text")
        row.put(name, " ".join(reversed(value.split())))


@direction_method("median")
class Median(FittedMethod):
    """The median of the rows, coordinate by coordinate."""

    takes = "block"
    example = "median(fruit)"
    options = ("limit",)
    min_rows = 3

    def fit(self, samples: Sequence[RowVectors], options: Mapping[str, Constant]) -> Floats:
        import numpy as np

        return np.median(samples[0].matrix(), axis=0)


@estimator("gradient_power")
class GradientPower(GradientEstimator):
    """`using gradient_power(power: NUMBER)`: powers of the absolute gradient, added up."""

    example = "using gradient_power(power: 1)"
    documentation = "The absolute gradient to a power, added up over the coordinates."
    convention = "no effect: powers of the absolute gradient, added up over the vectors of a cell"
    options: ClassVar[Mapping[str, int | float]] = {"power": 1}
    value_name = "gradient power"
    value_said = "powers of the gradient"
    formula = "Σ |∂m/∂site|^power"
    reads_written = False
    keeps_unit = False

    def check_option(self, name: str, value: float) -> str | None:
        return None if value >= 1 else "must be at least 1"

    def values(
        self, written: Tensor, base: Tensor, gradient: Tensor, options: Mapping[str, int | float]
    ) -> Tensor:
        return gradient.abs().pow(options["power"]).sum(-1)
