"""A plugin: a rule kind, a metric, a corruption, a direction method, a trainer, an estimator, an
aggregate, a baseline image and a statistic.

Modules that are slow to import (numpy, torch) are imported inside functions, so that `mechdsl
validate --plugin example` starts without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from mechdsl.images.picture import BaselineNumber, ImageBaseline
from mechdsl.program.direction_methods import FittedMethod, RowVectors, direction_method
from mechdsl.program.estimators import GradientEstimator, estimator
from mechdsl.program.images import image_baseline
from mechdsl.program.spec import Constant
from mechdsl.program.trainers import DictionaryOutline, IterativeTrainer, trainer
from mechdsl.resolve.types import ResolvedRule, VectorBatch
from mechdsl.rules.kinds import SiteRule, rule_kind
from mechdsl.syntax import ast
from mechdsl.syntax.tree_builder import ChangeSignature
from mechdsl.vocab.aggregates import CellAggregate, RowStatistic, aggregate, row_statistic
from mechdsl.vocab.corruptions import CorruptibleRow, ValueChange, change
from mechdsl.vocab.metrics import metric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Generator, Tensor, device

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


@trainer("tied")
class TiedTrainer(IterativeTrainer):
    """`fit(tied(features: 64), …)`: a ReLU autoencoder that encodes with its decoder."""

    example = "tied(features: 64)"
    options = ("features",)
    required = ("features",)

    def check_option(self, name: str, value: Constant | None) -> tuple[str, str] | None:
        if isinstance(value, int) and value >= 1:
            return None
        return "`features` must be a whole number from 1 on", "write `features: 64`"

    def outline(self, options: Mapping[str, Constant]) -> DictionaryOutline:
        return DictionaryOutline("standard", int(options["features"]))

    def start(
        self,
        widths: tuple[int, int],
        options: Mapping[str, Constant],
        random: Generator,
        device: device,
    ) -> TiedDictionary:
        import torch

        rows = torch.randn(int(options["features"]), widths[1], generator=random)
        return TiedDictionary(rows.to(device))


class TiedDictionary:
    """The parameters of `tied` during a training."""

    def __init__(self, decoder: Tensor) -> None:
        self.decoder = decoder / decoder.norm(dim=1, keepdim=True)
        self.parameters = {"decoder": self.decoder}
        self.memory: Mapping[str, Tensor] = {}

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        features = (inputs @ self.decoder.T).relu()
        error = (targets - features @ self.decoder).square().sum(1).mean()
        return error + 0.1 * features.sum(1).mean()

    def after_step(self) -> None:
        self.decoder.data.div_(self.decoder.data.norm(dim=1, keepdim=True))

    def weights(self) -> dict[str, Tensor]:
        decoder = self.decoder.detach().clone()
        return {
            "W_enc": decoder.T.clone(),
            "b_enc": decoder.new_zeros(decoder.shape[0]),
            "W_dec": decoder,
            "b_dec": decoder.new_zeros(decoder.shape[1]),
        }


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


@aggregate("rms")
class RootMeanSquare(CellAggregate):
    """`rms(delta, layer 3)`: the root of the mean square of the cells' effects."""

    documentation = "The root of the mean square of the cells' effects."

    def combine(self, values: Floats) -> Floats:
        return (values**2).mean(1) ** 0.5


@image_baseline("bands")
class Bands(ImageBaseline):
    """`image bands(8)`: black and white bands of this height in pixels."""

    documentation = "Horizontal bands, black and white in turn."
    number = BaselineNumber("a height in pixels", 1, 64, default=4, example=8)

    def pixels(self, size: tuple[int, int], number: int, seed: int) -> NDArray[np.uint8]:
        import numpy as np

        white = np.arange(size[0]) // number % 2 == 1
        return np.where(white[:, None, None], 255, 0).astype(np.uint8) * np.ones(
            (1, size[1], 3), np.uint8
        )


@row_statistic("spread")
class Spread(RowStatistic):
    """The interquartile range of the rows' effects, as a column of the results."""

    documentation = "interquartile range of the effects of the rows"
    min_rows = 4

    def compute(self, effects: Floats) -> float:
        import numpy as np

        low, high = np.quantile(effects, [0.25, 0.75])
        return high - low
