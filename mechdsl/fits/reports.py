"""What trainings led to: numbers next to those of controls, as tables, conventions and model cards
show them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from mechdsl.base.records import Record
from mechdsl.base.text import count_noun

CARD_FILE = "fit.json"
"""Facts about a training, in its folder."""

ROTATION_FILE = "rotation.safetensors"
"""The directions of a trained rotation, in its folder."""

MASK_FILE = "mask.json"
"""The sites of a trained mask with their probabilities, or the nodes or edges of a group or circuit
with their scores, in its folder."""

LENS_FILE = "lens.safetensors"
"""The maps of a trained lens, in its folder, as `tuned_lens("…")` reads them."""

PROBE_FILE = "probe.safetensors"
"""The maps of a trained probe, in its folder."""

VECTOR_FILE = "vector.safetensors"
"""A trained vector, edit or trained scales, in its folder."""

LISTED_SITES = 8
"""Chosen sites of a mask, or correlations, that a table lists."""


class Column(Record):
    """A number of a report: a column of its table, and words in texts."""

    title: str
    field: str
    """Attribute of the report: a number, one for each layer, or text."""
    note: str
    """Its meaning, below the table."""
    words: str = ""
    """Its name among the means in a convention; empty: it isn't listed. `{report.…}` is an
    attribute of the report here and in `card`."""
    card: str = ""
    """Its line in a model card; empty: it has none. `{card[…]}` is a fact of the card."""
    style: str = ".3f"
    """Format in the table."""
    card_style: str = ".4f"

    def show(self, value: float | str | None) -> str:
        """Format a value for the table; – for one that isn't defined."""
        if value is None:
            return "–"
        return value if isinstance(value, str) else format(value, self.style)


class FitReport(Record, ABC):
    """What is known of every training. A subclass has fields for its numbers, and says in
    `columns` how each is shown."""

    declares: ClassVar[str] = "basis"
    """First word of the statement that declares what was trained."""
    columns: ClassVar[tuple[Column, ...]] = ()
    has_steps: ClassVar[bool] = True

    rows: int
    """Training rows."""
    held_out_rows: int
    """Rows that the training didn't use, which its numbers are computed on; 0: on training rows."""
    steps: int
    """Steps that were done."""
    stopped_early: bool

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """Create the report from JSON. Raises TypeError if a field without default is missing."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__ if name in content})

    @property
    def measured_on(self) -> str:
        """`held-out` or `training`: the rows or vectors that the numbers are computed on."""
        return "held-out" if self.held_out_rows else "training"

    def lines(self) -> list[list[str]]:
        """Return the cells of the columns: one line, or one for each layer."""
        values = [getattr(self, column.field) for column in self.columns]
        count = max([1, *(len(value) for value in values if isinstance(value, list))])
        spread = [value if isinstance(value, list) else [value] * count for value in values]
        return [
            [column.show(value) for column, value in zip(self.columns, line, strict=True)]
            for line in zip(*spread, strict=True)
        ]

    def remarks(self) -> list[str]:
        """Return what the line below the table says besides the name and the folder."""
        return []

    @abstractmethod
    def describe(self) -> str:
        """Return the result as text, for conventions."""

    def describe_rows(self, card: Mapping[str, Any]) -> list[str]:
        """Return what a model card says about the rows and the result."""
        return [
            f"{self._name_rows(card)}; {count_noun(self.held_out_rows, 'row')} held out",
            *self._describe_training(card),
            *(
                f"- {column.card.format(report=self, card=card)}: {value:{column.card_style}}"
                for column in self.columns
                if column.card and (value := getattr(self, column.field)) is not None
            ),
        ]

    def _name_rows(self, card: Mapping[str, Any]) -> str:
        rows = f"- Rows: {self.rows:,} of `{card['prompts']}`"
        return f"{rows} ({card['run']}) at {card['positions']}"

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        """Return the lines of a model card before the numbers of the columns."""
        return []


# --- on vectors -----------------------------------------------------------------------------------


class VectorsReport(FitReport):
    """What a training on vectors led to, without a measure."""

    vectors: int
    """Vectors of the training rows; of a lens, of one layer."""
    held_out_vectors: int
    """Vectors that the following numbers are computed on; 0: on the training vectors."""

    @property
    def measured_on(self) -> str:
        return "held-out" if self.held_out_vectors else "training"

    def _name_rows(self, card: Mapping[str, Any]) -> str:
        return f"{super()._name_rows(card)}, {self.vectors:,} vectors"


def _explained(noun: str) -> Column:
    """Return the column of the variance that a dictionary explains.

    Args:
        noun: Plural of what it is trained on.
    """
    note = f"share of the variance of the held-out {noun}; without any, of training {noun}"
    card = "Explained variance on {report.measured_on} vectors"
    return Column("explained", "explained", note, card=card)


class TrainingReport(VectorsReport):
    """What a training of a dictionary led to, on vectors of rows that it didn't use."""

    columns = (
        _explained("vectors"),
        Column(
            "untrained",
            "untrained_explained",
            "the same with the first, random weights",
            card="The same with untrained weights",
        ),
        Column(
            "components",
            "components_explained",
            "the same for principal components, as many as features are active on average",
            card="The same with as many principal components",
        ),
        Column(
            "active",
            "active",
            "mean number of active features of a vector",
            card="Active features of a vector",
            style=".1f",
            card_style=".2f",
        ),
        Column(
            "inactive",
            "rounded_inactive",
            "features that are active for none of these vectors",
            card="Features without activity on these vectors",
            style=",",
            card_style=",",
        ),
    )

    explained: float
    """Share of the variance of the vectors that the dictionary explains."""
    active: float
    """Mean number of active features of a vector."""
    inactive: int
    """Features that are active for none of these vectors."""
    untrained_explained: float
    """The share that the dictionary explains with its first, random weights."""
    components_explained: float
    """The share that as many principal components of the training vectors explain as features are
    active on average."""

    @property
    def rounded_inactive(self) -> float:
        """`inactive`, of means over seeds with one decimal."""
        return round(self.inactive, 1)

    def describe(self) -> str:
        return (
            f"explains {self.explained:.3f} of the variance of {self.measured_on} vectors, "
            f"{self.active:.1f} features active"
        )

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        if "code" in card:  # the loss of a file
            return []
        penalty = " and a penalty on active features" if "penalty" in card["options"] else ""
        return [f"- Loss: squared error of the reconstruction{penalty}"]


class CrossLayerReport(VectorsReport):
    """What the training of a cross-layer transcoder led to, for each layer, on vectors of rows that
    it didn't use."""

    columns = (
        Column("layer", "layers", "layer whose MLP is reconstructed", style=""),
        Column(
            "explained",
            "explained",
            "share of the variance of the held-out outputs of this MLP; without any, of training "
            "outputs",
        ),
        Column("untrained", "untrained_explained", "the same with the first, random weights"),
        Column(
            "components",
            "components_explained",
            "the same for principal components, as many as features of this and earlier layers are "
            "active on average",
        ),
        Column(
            "active", "active", "mean number of active features that read the layer", style=".1f"
        ),
        Column(
            "inactive",
            "rounded_inactive",
            "features of the layer that are active for none of these vectors",
            style=",",
        ),
    )

    layers: list[int]
    explained: list[float]
    """Share of the variance of the outputs of each MLP that the transcoder explains."""
    active: list[float]
    """Mean number of active features of each layer at a token."""
    inactive: list[int]
    """Features of each layer that are active at none of these tokens."""
    untrained_explained: list[float]
    """The shares that the transcoder explains with its first, random weights."""
    components_explained: list[float]
    """The shares that as many principal components of the training vectors explain as features of
    this and earlier layers, which write to the layer, are active on average."""

    @property
    def rounded_inactive(self) -> list[float]:
        """`inactive`, of means over seeds with one decimal."""
        return [round(count, 1) for count in self.inactive]

    def describe(self) -> str:
        columns = zip(self.layers, self.explained, strict=True)
        listed = ", ".join(f"layer {layer} {share:.3f}" for layer, share in columns)
        return (
            f"share of the variance of {self.measured_on} MLP outputs that it explains: {listed}; "
            f"{sum(self.active):.1f} features active over all layers"
        )

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        penalty = " and a penalty on active features" if "penalty" in card["options"] else ""
        rows = zip(self.layers, self.explained, self.components_explained, strict=True)
        vectors = f"{self.measured_on} vectors"
        return [
            '- `transcoder("FOLDER") at mlp_out layer *` reads it; the layout is that of '
            "circuit-tracer",
            f"- Loss: squared error of all MLP outputs, each in units of its variance{penalty}",
            f"- Explained variance on {vectors} (of as many principal components):",
            *(f"  - layer {layer}: {share:.4f} ({other:.4f})" for layer, share, other in rows),
            f"- Active features at a token, over all layers: {sum(self.active):.2f}",
        ]


class DecoderReport(TrainingReport):
    """What a training on the decoder of a dictionary led to; its rows are decoder directions."""

    columns = (
        _explained("decoder directions"),
        Column(
            "normal",
            "normal_explained",
            "the same for a dictionary of normal vectors with the same mean and covariance",
            card="The same with a dictionary of normal vectors with the same covariance, on "
            "{report.measured_on} ones",
        ),
        *TrainingReport.columns[1:],
    )

    normal_explained: float
    """`explained` of a dictionary of the same size, trained in the same way on normal vectors with
    the mean and the covariance of the training vectors, for as many held-out normal vectors."""

    def describe(self) -> str:
        normal = f"of normal vectors with the same covariance {self.normal_explained:.3f}"
        return f"{super().describe()}; {normal}"

    def _name_rows(self, card: Mapping[str, Any]) -> str:
        rows = f"- Rows: {self.rows:,} of `{card['prompts']}`, {self.vectors:,} vectors"
        return f"- The dictionary of the decoder: {card['dictionary']}\n{rows}"


class IndependenceReport(VectorsReport):
    """How independent components are, on vectors of rows that the training didn't use."""

    columns = (
        _explained("vectors"),
        Column(
            "kurtosis",
            "kurtosis",
            "median over components of the size of the excess kurtosis of the coordinates of "
            "these vectors; 0 for a normal distribution",
            card="Median excess kurtosis of coordinates there",
        ),
        Column(
            "random",
            "untrained_kurtosis",
            "the same for a random rotation of the whitened vectors",
            card="The same for a random rotation",
        ),
        Column(
            "components",
            "components_kurtosis",
            "the same for principal components, which explain the same share",
            card="The same for principal components",
        ),
    )

    explained: float
    """Share of the variance of the held-out vectors; without any, of the training vectors, as in
    the following numbers. As many principal components of the training vectors explain as much."""
    kurtosis: float
    """Median over the components of the size of the excess kurtosis of their coordinates."""
    untrained_kurtosis: float
    """The same for the first, random rotation of the whitened vectors."""
    components_kurtosis: float
    """The same for as many principal components."""

    def describe(self) -> str:
        return (
            f"explains {self.explained:.3f} of the variance of {self.measured_on} vectors, median "
            f"excess kurtosis {self.kurtosis:.2f} (random rotation {self.untrained_kurtosis:.2f})"
        )


class CorrelationReport(VectorsReport):
    """How coordinates of two sets of vectors correlate, on rows that the training didn't use."""

    columns = (
        Column(
            "paired",
            "mean",
            "mean over components of the correlation of both coordinates on held-out vectors; "
            "without any, on training vectors",
            card="Their mean",
        ),
        Column(
            "train", "training", "the same on training vectors", card="The same on training vectors"
        ),
        Column(
            "shuffled",
            "shuffled",
            "the same on held-out vectors after a training on pairs in a random order",
            card="The same after a training on shuffled pairs",
        ),
        Column(
            "random",
            "untrained",
            "the same for random directions",
            card="The same for random directions",
        ),
        Column(
            "pca",
            "components",
            "the same for pairs of principal components",
            card="The same for principal components",
        ),
    )

    explained: float
    """Share of the variance of the held-out vectors of the basis; without any, of the training
    vectors, as in the following numbers."""
    correlations: tuple[float, ...]
    """Pearson correlation of each pair of coordinates on the held-out vectors. Each pair has the
    sign for which its correlation on the training vectors is positive, as have the controls."""
    training: float
    """Their mean on the training vectors."""
    shuffled: float
    """The mean on held-out vectors after a training on pairs in a random order."""
    untrained: float
    """The mean for random directions."""
    components: float
    """The mean for pairs of principal components, the largest ones of both sets first."""
    numbers: float
    """Mean number of weights of a component that aren't 0."""

    @property
    def mean(self) -> float:
        """Mean correlation on the held-out vectors."""
        return sum(self.correlations) / len(self.correlations)

    @property
    def listed(self) -> str:
        """The correlations, as text."""
        return _list_first([f"{correlation:.3f}" for correlation in self.correlations])

    def remarks(self) -> list[str]:
        return [
            f"correlations {self.listed}",
            f"explains {self.explained:.3f} of the variance of these vectors",
            f"{self.numbers:.1f} weights of a component aren't 0",
        ]

    def describe(self) -> str:
        return (
            f"correlations on {self.measured_on} vectors {self.listed} (mean {self.mean:.3f}, "
            f"after shuffled pairs {self.shuffled:.3f}, random {self.untrained:.3f}, principal "
            f"components {self.components:.3f})"
        )

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        on, listed = (
            self.measured_on,
            ", ".join(f"{correlation:.4f}" for correlation in self.correlations),
        )
        return [
            f"- Correlated with {card['with']}",
            f"- Explained variance on {on} vectors: {self.explained:.4f}",
            f"- Weights of a component that aren't 0: {self.numbers:.1f}",
            f"- Correlations on {on} vectors: {listed}",
        ]


class MixtureReport(VectorsReport):
    """How likely a mixture is, on vectors of rows that the training didn't use."""

    columns = (
        Column(
            "mixture",
            "log_likelihood",
            "mean log likelihood of the held-out vectors in nats; without any, of training vectors",
            card="Mean log likelihood of {report.measured_on} vectors (nats)",
            style=".2f",
        ),
        Column(
            "random",
            "untrained",
            "the same for random training vectors as means",
            card="The same for random vectors as means",
            style=".2f",
        ),
        Column(
            "one",
            "single",
            "the same for one Gaussian",
            card="The same for one Gaussian",
            style=".2f",
        ),
        Column(
            "shuffled",
            "shuffled",
            "the same for a mixture of vectors whose coordinates along their principal axes "
            "are exchanged at random, on held-out vectors that are changed in this way",
            card="The same for a mixture of shuffled vectors, on shuffled vectors",
            style=".2f",
        ),
        Column(
            "empty",
            "empty_share",
            "components that are the most likely one of none of these vectors",
            card="Components that are likely for none of these vectors",
            card_style="",
        ),
    )

    log_likelihood: float
    """Mean log density of the held-out vectors in nats; without any, of the training vectors, as in
    the following numbers."""
    untrained: float
    """The same for random training vectors as means, with the covariance of all of them."""
    single: float
    """The same for one Gaussian with a covariance of this type."""
    shuffled: float
    """The same for a mixture of vectors whose coordinates along their principal axes are exchanged
    at random, on held-out vectors that are changed in this way."""
    components: int
    empty: int
    """Components that are the most likely one of none of these vectors."""

    @property
    def empty_share(self) -> str:
        """`0 of 16`."""
        return _show_share(self.empty, self.components)

    def describe(self) -> str:
        return (
            f"mean log likelihood of {self.measured_on} vectors {self.log_likelihood:.2f} nats "
            f"(one Gaussian {self.single:.2f}, shuffled {self.shuffled:.2f})"
        )


class LensReport(VectorsReport):
    """What the training of a lens led to: for each layer, means of KL(p ‖ q) in nats over vectors
    of rows that it didn't use, where p is the model's distribution over next tokens."""

    declares = "lens"
    columns = (
        Column("layer", "layers", "layer whose vectors the lens reads", style=""),
        Column(
            "trained",
            "trained",
            "mean KL in nats from the model's distribution to that of the lens, over held-out "
            "vectors; without any, over training vectors",
        ),
        Column("logit lens", "untrained", "the same without training"),
        Column(
            "average",
            "average",
            "the same for the mean of the model's distributions over training vectors",
            card="The same for the average prediction on training vectors",
        ),
    )

    layers: list[int]
    trained: list[float]
    """q: the distribution of the trained lens."""
    untrained: list[float]
    """q: that of the logit lens, from which the training starts."""
    average: float
    """q: the mean of p over training vectors, which no vector is read for."""

    def describe(self) -> str:
        columns = zip(self.layers, self.untrained, self.trained, strict=True)
        listed = ", ".join(f"layer {n} {before:.4g} → {after:.4g}" for n, before, after in columns)
        return (
            f"mean KL in nats on {self.measured_on} vectors, logit lens → trained: {listed}; "
            f"average prediction {self.average:.4g}"
        )

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        columns = zip(self.layers, self.untrained, self.trained, strict=True)
        return [
            f'- `observe tuned_lens("{LENS_FILE}")` reads it; the last layer needs no map',
            f"- Mean KL (nats) from the model's distribution, on {self.measured_on} vectors, logit "
            "lens → trained:",
            *(f"  - layer {layer}: {before:.4f} → {after:.4f}" for layer, before, after in columns),
        ]


# --- on values of rows ----------------------------------------------------------------------------


class ProbeReport(FitReport):
    """How well a probe predicts, in each of its layers, on rows that it wasn't trained on: the
    accuracy for a class, R² for a number, None if it isn't defined."""

    declares = "probe"
    has_steps = False
    columns = (
        Column("layer", "layers", "layer, or head, whose vectors the probe reads", style=""),
        Column(
            "trained",
            "trained",
            "accuracy for a class, R² for a number, on held-out rows; without any, on training "
            "rows",
        ),
        Column("shuffled", "shuffled", "the same for the probe of shuffled training values"),
        Column(
            "random",
            "random",
            "mean of the same over probes that read one random direction of the vectors",
        ),
        Column(
            "constant",
            "constant",
            "the same for the most common class, or the mean, of training rows",
        ),
    )

    predicts: str
    """The value, as the file names it."""
    unit: str
    """`accuracy` or `R²`."""
    distinct_rows: int
    """Training rows with different inputs up to the position."""
    layers: list[int | str | None]
    """Layers, or heads as `L2H1`; None for a site without layers."""
    trained: list[float | None]
    shuffled: list[float | None]
    """The same for the probe of shuffled training values."""
    random: list[float | None]
    """The mean of the same over probes of one random direction of the vectors."""
    draws: int
    """Number of random directions."""
    constant: float | None
    """The same for the most common class, or the mean, of training rows."""

    def remarks(self) -> list[str]:
        rows = f"{self.distinct_rows:,} different training rows"
        return [f"{self.unit} for `{self.predicts}`, {rows}"]

    def describe(self) -> str:
        best = max(self.trained, key=lambda own: float("-inf") if own is None else own)
        number = self.trained.index(best)
        several = len(self.layers) > 1 and best is not None
        site = self.layers[number]
        where = f" in {site if isinstance(site, str) else f'layer {site}'}, the best one"
        where = where if several else ""
        shown = [own[number] for own in (self.trained, self.shuffled, self.random)]
        trained, shuffled, drawn, constant = map(_show_score, (*shown, self.constant))
        return (
            f"{self.unit} on {self.measured_on} rows{where}: trained {trained}, shuffled values "
            f"{shuffled}, {self.draws} random directions {drawn}, always the same {constant}"
        )

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        columns = zip(self.layers, self.trained, self.shuffled, self.random, strict=True)
        shown = [[column[0], *map(_show_score, column[1:])] for column in columns]
        classes = ", ".join(map(str, card["classes"]))
        of_heads = isinstance(self.layers[0], str)
        map_name, word = ("layer.N.head.N", "") if of_heads else ("layer.N", "layer ")
        return [
            f"- Predicts: `{self.predicts}`" + (f", of the classes {classes}" if classes else ""),
            f"- Training rows with different inputs up to there: {self.distinct_rows:,}",
            f"- `{PROBE_FILE}` has `{map_name}.weight` [output, width] and `{map_name}.bias` "
            f"[output]; the outputs are {'logits of the classes' if classes else 'the number'}",
            f"- {self.unit} on {self.measured_on} rows: trained; with shuffled values; mean over "
            f"{self.draws} random directions",
            *(f"  - {word}{n}: {own}; {mixed}; {drawn}" for n, own, mixed, drawn in shown),
            f"- The same for the {'most common class' if classes else 'mean'} of training rows: "
            f"{_show_score(self.constant)}",
        ]


# --- on a measure ---------------------------------------------------------------------------------


def _trained(condition: str) -> Column:
    """Return the column of the trained result.

    Args:
        condition: When the measure is computed.
    """
    return Column(
        "trained",
        "trained",
        f"mean of the measure over held-out rows while {condition}; without held-out rows, over "
        "training rows",
        words="{report.written}",
        card="Mean of the measure over {report.measured_on} rows",
    )


CLEAN_RUN = Column(
    "no patch", "unpatched", "the same in the clean run", "no patch", "The same without a patch"
)
"""The column of the measure in the clean run."""


class MeasureReport(FitReport):
    """What a training on a measure led to: means of the measure over rows that it didn't use."""

    objective: str
    """`maximise logit(answer of fewer)`."""

    @property
    def written(self) -> str:
        """Name of the trained result in conventions."""
        return "trained"

    def remarks(self) -> list[str]:
        return [self.objective]

    def describe(self) -> str:
        return f"to {self.objective}; {self._list_means()}"

    def _list_means(self) -> str:
        """Return the means of the measure, as text."""
        columns = [(column, getattr(self, column.field)) for column in self.columns if column.words]
        listed = ", ".join(
            f"{column.words.format(report=self)} {value:.4g}"
            for column, value in columns
            if value is not None
        )
        return f"mean over {self.measured_on} rows: {listed}"


class RotationReport(MeasureReport):
    """What the training of a rotation led to."""

    columns = (
        _trained("the trained subspace is patched"),
        Column(
            "random",
            "untrained",
            "the same for a random subspace of the same size",
            "random subspace",
            "The same with a random subspace",
        ),
        CLEAN_RUN,
        Column(
            "whole",
            "whole",
            "the same while the whole vector is patched",
            "whole vector",
            "The same with the whole vector",
        ),
    )

    directions: int
    trained: float
    """The measure while the trained subspace is patched."""
    untrained: float
    """The same for the first, random subspace of the same size."""
    unpatched: float
    """The measure of the clean run."""
    whole: float
    """The measure while the whole vector is patched."""

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        return [f"- The subspace of `{card['from']}` comes in, to {self.objective}"]


class VectorEditReport(MeasureReport):
    """What the training of one or several vectors led to, or of an edit that adds them."""

    declares = "direction"
    what_has_length: ClassVar[str] = "mean length"

    length: float
    """Length of the vector; of several, their mean length."""
    site_length: float
    """Mean length of the vectors that it is added to, in the clean run, or that they replace."""

    def remarks(self) -> list[str]:
        return [f"vectors of the site have length {self.site_length:.3g}", *super().remarks()]

    def describe(self) -> str:
        return (
            f"{super().describe()}; {self.what_has_length} {self.length:.4g}, vectors of the site "
            f"{self.site_length:.4g}"
        )

    def _describe_length(self) -> str:
        """Return the line of a model card on lengths."""
        what = self.what_has_length.capitalize()
        return f"- {what}: {self.length:.4f}; vectors of the site have {self.site_length:.4f}"


class VectorReport(VectorEditReport):
    """What the training of a vector led to."""

    what_has_length = "length"
    columns = (
        Column("length", "length", "length of the vector", style=".3g"),
        _trained("the vector is added"),
        Column(
            "random",
            "random",
            "mean of the same over 8 random vectors of this length",
            "random vectors of this length",
            "The same with random vectors of this length",
        ),
        Column(
            "no vector",
            "unsteered",
            "the same in the clean run",
            "no vector",
            "The same without a vector",
        ),
        Column(
            "difference",
            "difference",
            "the same for the mean difference between `from` and the clean run over training "
            "rows, scaled to this length; –: no `from`",
            "mean difference at this length",
            "The same with the mean difference from `{card[from]}` at this length",
        ),
    )

    trained: float
    """The measure while the trained vector is added."""
    random: float
    """The mean of the same over random vectors of the same length."""
    unsteered: float
    """The measure of the clean run."""
    difference: float | None
    """The measure while the mean difference between the run `from` and the clean run is added, over
    training rows and with the same length; None without `from`."""

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        return [
            f"- The vector is added at these tokens, to {self.objective}",
            self._describe_length(),
        ]


class SoftPromptReport(VectorEditReport):
    """What the training of a soft prompt led to."""

    columns = (
        Column("length", "length", "mean length of the vectors", style=".3g"),
        _trained("the vectors are written"),
        Column(
            "random",
            "random",
            "mean of the same over 8 draws of random vectors of these lengths",
            "random vectors of these lengths",
            "The same with random vectors of these lengths",
        ),
        Column(
            "start",
            "untrained",
            "the same for the vectors from which the training starts",
            "untrained",
            "The same with the untrained vectors",
        ),
        Column(
            "no vector",
            "placeholders",
            "the same for the run without a written vector",
            "placeholders",
            "The same with placeholders",
        ),
        Column(
            "clean",
            "clean",
            "the same in the clean run, without inserted tokens; –: trained on the clean run",
            "clean run",
            "The same in the clean run",
        ),
    )

    tokens: int
    """Number of vectors."""
    trained: float
    """The measure with the trained vectors."""
    random: float
    """The mean of the same over random vectors of the same lengths."""
    placeholders: float
    """The measure of the run without a written vector: with placeholders."""
    clean: float | None
    """The measure of the clean run, without inserted tokens; None if it is the run of the
    training."""
    untrained: float | None = None
    """The measure with the vectors from which the training starts: the means of those that they
    replace, or for tokens inserted into images random vectors of the mean length of others; None in
    a report of an earlier version."""

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        return [
            f"- {self.tokens} vectors replace those at these tokens, to {self.objective}",
            self._describe_length(),
        ]


class EditReport(VectorEditReport):
    """What the training of an edit led to."""

    what_has_length = "mean length of what it adds"
    columns = (
        Column("length", "length", "mean length of the vectors that the edit adds", style=".3g"),
        _trained("the edit is added"),
        Column(
            "subspace",
            "turned",
            "mean of the same over 8 edits that add vectors of the same lengths to the same "
            "activations, in a random subspace of this rank",
            "in a random subspace",
            "The same in random subspaces of rank {report.rank}",
        ),
        Column(
            "random",
            "random",
            "mean of the same over 8 random edits of this rank and mean length",
            "random edits of this length",
            "The same with random edits of this rank and length",
        ),
        Column(
            "constant",
            "constant",
            "the same while the mean of the vectors that the edit adds is always added",
            "always the mean of what it adds",
            "The same with the mean of what it adds, always",
        ),
        Column(
            "no edit",
            "unedited",
            "the same in the clean run",
            "no edit",
            "The same without an edit",
        ),
    )

    rank: int
    """Number of directions that it adds."""
    trained: float
    """The measure with the trained edit."""
    turned: float
    """The mean of the same over edits that add vectors of the same lengths to the same activations,
    in a random subspace of this rank."""
    random: float
    """The mean of the same over random edits of this rank that add vectors of this mean length."""
    constant: float
    """The measure while the mean of the vectors that the trained edit adds is always added."""
    unedited: float
    """The measure of the clean run."""

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        return [
            f"- The edit adds Aᵀ B x + c to an activation x at these tokens, to {self.objective}",
            f"- `{VECTOR_FILE}` has B as `edit.reads` [rank, width], A as `edit.writes` [rank, "
            "width] and c as `edit.offset` [width]; LoReFT: A = R, B = W − R, c = Rᵀ b",
            self._describe_length(),
        ]


class ScaleReport(MeasureReport):
    """What the training of scales led to."""

    declares = "direction"
    columns = (
        Column("scales", "span", "smallest and largest scale of a channel"),
        _trained("the vectors are scaled"),
        Column(
            "random",
            "shuffled",
            "mean of the same over 8 random orders of the channels",
            "in a random order",
            "The same with the scales in a random order",
        ),
        Column(
            "mean",
            "uniform",
            "the same while all channels have the mean scale",
            "mean scale for all channels",
            "The same with the mean scale for all channels",
        ),
        Column(
            "zero",
            "zero",
            "the same while the vectors are 0",
            "scale 0",
            "The same with a scale of 0",
        ),
        Column(
            "no scale",
            "unscaled",
            "the same in the clean run",
            "no scale",
            "The same without scales",
        ),
    )

    smallest: float
    """Smallest scale of a channel."""
    largest: float
    average: float
    """Mean scale of the channels."""
    trained: float
    """The measure while the vectors are scaled."""
    shuffled: float
    """The mean of the same over random orders of the channels."""
    uniform: float
    """The measure while all channels are scaled by the mean scale."""
    zero: float
    """The measure while the vectors are 0."""
    unscaled: float
    """The measure of the clean run."""

    @property
    def span(self) -> str:
        """`0.10..2.30`."""
        return f"{self.smallest:.2f}..{self.largest:.2f}"

    def describe(self) -> str:
        return f"{super().describe()}; scales from {self.smallest:.4g} to {self.largest:.4g}"

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        span = f"from {self.smallest:.4f} to {self.largest:.4f}"
        return [
            f"- Vectors are multiplied by the scales at these tokens, to {self.objective}",
            f"- Scales of channels are {span}, with a mean of {self.average:.4f}",
        ]


class ChoiceReport(MeasureReport):
    """What the training of a choice of sites, positions, coordinates or edges led to."""

    chosen: dict[str, float]
    """The chosen ones with their scores."""
    candidates: int
    """Number of those that it chooses from."""

    def _name_source(self, card: Mapping[str, Any]) -> str:
        """Return where the written values are from, for a model card."""
        return f"the run `{card['from']}`" if card["from"] else f"the {card['with']}"


class MaskReport(ChoiceReport):
    """What the training of a mask led to: means of its measure with 0 and 1 instead of the values
    of gates. The scores of `chosen` are the probabilities of their gates."""

    declares = "group"
    columns = (
        _trained("the group is written, or with `keep` everything else"),
        Column(
            "random",
            "random",
            "mean of the same over random groups of this size",
            "{report.draws} random choices",
            "The same for {report.draws} random choices of this size",
        ),
        Column(
            "single",
            "single",
            "the same for the group with the largest effects alone on training rows; –: it "
            "costs more than the training",
            "largest single effects",
            "The same for the largest effects of single {report.noun}s",
        ),
        CLEAN_RUN,
        Column(
            "all",
            "whole",
            "the same while everything that the mask chooses from is written",
            "all {report.noun}s",
            "The same with every {report.noun}",
        ),
        Column(
            "undecided",
            "undecided_share",
            "chosen with a probability below 0.9, or not chosen with one above 0.1",
        ),
    )

    undecided: int
    """Number of chosen ones with a probability below 0.9, and of others above 0.1."""
    keeps: bool
    """Whether everything is written but what is chosen."""
    trained: float
    """The measure while the choice is written; if the mask keeps them, while all others are.
    Also for the following controls."""
    random: float
    """The mean of the same over random choices of the same size."""
    draws: int
    """Number of random choices."""
    single: float | None
    """The same for the sites that have the largest effects alone on training rows; None if they
    would cost more than the training."""
    single_rows: int
    """Training rows that these effects are computed on."""
    unpatched: float
    """The measure of the clean run."""
    whole: float
    """The measure while every candidate is written."""
    inactive: int = 0
    """Number of further candidates, which don't change any training row; the mask and its random
    choices don't choose them."""
    noun: str = "site"
    """What one candidate is: `site`, `position`, `feature`, `dimension` or `edge`."""
    drawn: str = ""
    """How random choices were drawn, if it isn't as `against random` draws them."""

    @property
    def written(self) -> str:
        return "all others written" if self.keeps else "trained"

    @property
    def undecided_share(self) -> str:
        """`0 of 16`."""
        return _show_share(self.undecided, self.candidates)

    def list_chosen(self) -> str:
        """Return `L2H0.z (0.89), L3H1.z (0.99)`, at most `LISTED_SITES` of them."""
        listed = [f"{name} ({likely:.2f})" for name, likely in self.chosen.items()]
        text = _list_first(listed)
        if len(listed) <= LISTED_SITES:
            return text
        return f"{text}, with probabilities from {min(self.chosen.values()):.2f}"

    def remarks(self) -> list[str]:
        drawn = [self.drawn] if self.drawn else []
        return [*self._count_inactive(), self.list_chosen(), *drawn, *super().remarks()]

    def _count_inactive(self) -> list[str]:
        """Return how many candidates have no gate, as text; empty if all have one."""
        if not self.inactive:
            return []
        return [f"{self.inactive:,} further {self.noun}s change no training row"]

    def describe(self) -> str:
        decided = f"{self.undecided} of {self.candidates} {self.noun}s undecided"
        more = [*self._count_inactive(), f"probabilities: {self.list_chosen()}", decided]
        more += [self.drawn] if self.drawn else []
        return "; ".join([super().describe(), *more])

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        noun, every = self.noun, self.keeps
        written = f"Every {noun} but the chosen ones is" if every else f"The chosen {noun}s are"
        unchanged = f"- Further {noun}s that change no training row: {self.inactive:,}"
        return [
            f"- {written} set to those of {self._name_source(card)}, to {self.objective}",
            f"- Chosen: {', '.join(f'{name} ({own:.2f})' for name, own in self.chosen.items())}",
            f"- Undecided {noun}s: {self.undecided} of {self.candidates:,}",
            *([unchanged] if self.inactive else []),
        ]


class CircuitReport(ChoiceReport):
    """What the search for a circuit by scores of edges led to. The scores of `chosen`, in
    descending order of their sizes, are changes of the measure, on training rows, if the edge
    carries the other value."""

    declares = "circuit"
    columns = (
        Column("edges", "edges", "edges of the circuit, of all edges of the model"),
        _trained("all other edges carry the other values"),
        Column(
            "random",
            "random",
            "mean of the same over 8 random circuits of this size",
            "{report.draws} random circuits",
            "The same for {report.draws} random circuits of this size",
        ),
        CLEAN_RUN,
        Column(
            "all",
            "whole",
            "the same while every edge carries the other value",
            "all edges",
            "The same with every edge",
        ),
    )

    selected: int
    """Number of edges before those were removed that don't lead to the end of the model."""
    made: str
    """How the edges were selected, and how many of them were removed."""
    trained: float
    """The measure while all edges carry the other values but those of the circuit."""
    random: float
    """The mean of the same over random circuits with the same number of edges."""
    draws: int
    """Number of random circuits."""
    unpatched: float
    """The measure of the clean run."""
    whole: float
    """The measure while every edge carries the other value."""
    drawn: str = ""
    """How random choices were drawn, if it isn't as `against random` draws them."""

    def is_opposed(self, *, minimises: bool) -> bool:
        """Return whether the measure is better with every edge ablated than in the clean run, for
        a search that makes it smaller or larger."""
        better = self.unpatched - self.whole
        return better != 0 and (better < 0) != minimises

    @property
    def written(self) -> str:
        return "all other edges written"

    @property
    def edges(self) -> str:
        """`20 of 1,024`."""
        return f"{len(self.chosen):,} of {self.candidates:,}"

    def list_chosen(self) -> str:
        """Return `L1H1 -> logits (-0.89), embed -> L1H1.k (0.12)`, at most `LISTED_SITES`."""
        return _list_first([f"{name} ({score:.3g})" for name, score in self.chosen.items()])

    def remarks(self) -> list[str]:
        drawn = [self.drawn] if self.drawn else []
        return [f"scores {self.list_chosen()}", self.made, *drawn, *super().remarks()]

    def describe(self) -> str:
        drawn = f" ({self.drawn})" if self.drawn else ""
        return (
            f"to {self.objective}; {self.made}; {self._list_means()}{drawn}; scores, on training "
            f"rows: {self.list_chosen()}"
        )

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        listed = ", ".join(f"{name} ({score:.4g})" for name, score in self.chosen.items())
        return [
            "- Every edge but those of the circuit is set to the values of "
            f"{self._name_source(card)}, to {self.objective}",
            f"- Edges with their scores: {listed}",
            f"- Of {self.candidates:,} edges; {self.made}",
        ]


class NodeReport(ChoiceReport):
    """What the choice of a group by scores of nodes led to. The scores of `chosen`, in descending
    order of their sizes, are estimated changes of the measure, on training rows, if the node alone
    has the other value."""

    declares = "group"
    columns = (
        Column("chosen", "chosen_share", "nodes of the group, of all that can be chosen"),
        Column(
            "kept",
            "trained",
            "mean of the measure over held-out rows while all other nodes are written; without "
            "held-out rows, over training rows",
            words="all other {report.noun}s written",
            card="Mean of the measure over {report.measured_on} rows, with all other "
            "{report.noun}s written",
        ),
        Column(
            "random",
            "random",
            "mean of `kept` over random groups of this size",
            "the same for {report.draws} random groups",
            "The same for {report.draws} random groups of this size",
        ),
        Column(
            "written",
            "alone",
            "the same while the group is written",
            "the group written",
            "The same while the group is written",
        ),
        CLEAN_RUN,
        Column(
            "all",
            "whole",
            "the same while every node is written",
            "all {report.noun}s written",
            "The same with every {report.noun}",
        ),
    )

    how: ClassVar[str] = "by estimated effects"
    """How candidates were chosen."""
    scored: ClassVar[str] = "estimated effects"
    """What scores are."""
    made: str
    """How the nodes were selected."""
    trained: float
    """The measure while all candidates are written but those of the group; of a search, while the
    group is written."""
    random: float
    """The mean of the same over random groups of the same size."""
    draws: int
    """Number of random groups."""
    alone: float
    """The measure while the group is written; of a search, while all other candidates are."""
    unpatched: float
    """The measure of the clean run."""
    whole: float
    """The measure while every candidate is written."""
    inactive: int = 0
    """Number of further candidates, which don't change any training row; neither the group nor
    random groups have them."""
    noun: str = "site"
    """What one candidate is: `site`, `position`, `feature` or `dimension`."""

    @property
    def chosen_share(self) -> str:
        """`4 of 16`."""
        return f"{len(self.chosen):,} of {self.candidates:,}"

    @property
    def measure(self) -> str:
        """`logit(answer)`; its direction has no effect on scores."""
        return self.objective.partition(" ")[2]

    def list_chosen(self) -> str:
        """Return `L3H1.z (-0.89), L2H0.z (0.12)`, at most `LISTED_SITES` of them."""
        return _list_first([f"{name} ({score:.3g})" for name, score in self.chosen.items()])

    def _list_remarks(self) -> list[str]:
        """Return how the nodes were selected, and how many candidates can't be."""
        if not self.inactive:
            return [self.made]
        return [self.made, f"{self.inactive:,} further {self.noun}s change no training row"]

    def remarks(self) -> list[str]:
        return [
            f"{self.scored} {self.list_chosen()}",
            *self._list_remarks(),
            f"measure {self.measure}",
        ]

    def describe(self) -> str:
        return "; ".join(
            [
                f"{self.how} on {self.measure}",
                *self._list_remarks(),
                self._list_means(),
                f"{self.scored}, on training rows: {self.list_chosen()}",
            ]
        )

    def _describe_training(self, card: Mapping[str, Any]) -> list[str]:
        listed = ", ".join(f"{name} ({score:.4g})" for name, score in self.chosen.items())
        unchanged = f"- Further {self.noun}s that change no training row: {self.inactive:,}"
        return [
            f"- Chosen {self.how} of {self._name_source(card)} on {self.measure}",
            f"- Chosen {self.noun}s with their {self.scored}: {listed}",
            f"- Of {count_noun(self.candidates, self.noun)}; {self.made}",
            *([unchanged] if self.inactive else []),
        ]


class NodeSearchReport(NodeReport):
    """What the search for a group led to. The scores of `chosen`, in the order in which they were
    added, are the changes of the measure when each was written together with those before it."""

    columns = (
        NodeReport.columns[0],
        Column(
            "written",
            "trained",
            "mean of the measure over held-out rows while the group is written; without held-out "
            "rows, over training rows",
            "the group written",
            "Mean of the measure over {report.measured_on} rows, with the group written",
        ),
        Column(
            "random",
            "random",
            "mean of `written` over random groups of this size",
            "the same for {report.draws} random groups",
            "The same for {report.draws} random groups of this size",
        ),
        Column(
            "others",
            "alone",
            "the same while all nodes but the group are written",
            "all other {report.noun}s written",
            "The same while all other {report.noun}s are written",
        ),
        *NodeReport.columns[4:],
    )

    how = "one after another, by effects"
    scored = "changes in the order of addition"

    @property
    def measure(self) -> str:
        """`logit(answer), to maximise it`."""
        aim, _, measure = self.objective.partition(" ")
        return f"{measure}, to {aim} it"


# --- text -----------------------------------------------------------------------------------------


def _list_first(names: Sequence[str]) -> str:
    """Return at most `LISTED_SITES` names, and how many more there are."""
    more = len(names) - LISTED_SITES
    text = ", ".join(names[:LISTED_SITES])
    return text if more <= 0 else f"{text} and {more:,} more"


def _show_share(count: float, every: float) -> str:
    """Return `0 of 16`; of means over seeds `0.3 of 16`, and of their intervals `0.5`."""
    of = "" if math.isnan(every) else f" of {every:g}"
    return f"{round(count, 1):g}{of}"


def _show_score(score: float | None) -> str:
    """Format a score of a probe; – for one that isn't defined."""
    return "–" if score is None else f"{score:.3f}"
