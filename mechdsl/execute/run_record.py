"""Options, pass sizes, counts and saved files of a run, without importing torch.

`results`, `show` and `cli` import this module at start-up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from mechdsl.base.text import count_noun, format_size

if TYPE_CHECKING:
    from mechdsl.models.shape import PaddingSide

ProgressCallback = Callable[[int, int], None]
"""(rows done, total rows)."""


@dataclass(frozen=True)
class ExecutionOptions:
    """Options of an execution; results depend on them only in their last bits."""

    side: PaddingSide | None = None
    """Side of padding. None: where it is harmless to the model, preferably on the left, so that
    prompts end in one column and writes near the end need few columns."""
    on_progress: ProgressCallback | None = None
    pass_tokens: int | None = None
    """Maximum number of tokens in one pass over patched rows; None: chosen by device, free memory
    and measurement."""
    prompt_tokens: int | None = None
    """Maximum number of tokens in one batch of unpatched prompts; by default reduced if memory is
    short and `pass_tokens` isn't given either."""
    allow_nan: bool = False
    """Whether to exclude rows with NaN, or with an infinity that a metric can't use. This option
    does change results."""


SizeOrigin = Literal["default", "given", "measured", "memory"]
"""Origin of a pass size; `memory`: there wasn't enough memory for a larger one."""


@dataclass(frozen=True)
class PassSizes:
    """Sizes of a run's passes. Another run of the same plan with both sizes has the same layout."""

    pass_tokens: int
    """Maximum for one pass over patched rows."""
    prompt_tokens: int
    """Maximum for one batch of unpatched prompts."""
    chosen: SizeOrigin
    """Origin of `pass_tokens`."""


@dataclass
class ExecutionProfile:
    """Counts and seconds of one execution."""

    rows: int = 0
    """Patched rows that could differ from the base run."""
    distinct: int = 0
    """Number of these rows that were run: equal rows run once."""
    estimated: int = 0
    """Rows whose values were estimated by gradients instead of run."""
    known: int = 0
    """Patched rows whose values were in the store before the run."""
    resumed: int = 0
    """Number of `rows` and `estimated` that were computed before the run was interrupted."""
    not_kept: dict[str, str] = field(default_factory=dict[str, str])
    """Experiments whose values can't be stored, by key → reason."""
    unpatched_passes: int = 0
    """Forward passes over batches of unpatched prompts."""
    passes: int = 0
    """Forward passes over rows."""
    tokens: list[int] = field(default_factory=list[int])
    """Number of tokens of the rows in each pass."""
    halved: int = 0
    """How often a pass ran out of memory and was repeated at half the size."""
    unpatched_seconds: float = 0.0
    patched_seconds: float = 0.0

    def passed(self, tokens: int, seconds: float) -> None:
        """Record a pass with its number of tokens and its duration."""
        self.passes += 1
        self.tokens.append(tokens)
        self.patched_seconds += seconds


@dataclass
class RowCounts:
    """Counts of rows of cells, each counted once for every rule that it is run with."""

    computed: int = 0
    stored: int = 0
    """Rows whose values came from the store."""
    not_kept: dict[str, str] = field(default_factory=dict[str, str])
    """Experiments whose values can't be stored, by key → reason."""

    def add(self, profile: ExecutionProfile) -> None:
        """Add the counts of one execution."""
        self.computed += profile.rows + profile.estimated - profile.resumed
        self.stored += profile.known + profile.resumed
        self.not_kept.update(profile.not_kept)


@dataclass(frozen=True)
class SavedFile:
    """One file of activations, of their means, of directions or of the rows of features."""

    experiment: str
    kind: Literal["vectors", "means", "direction", "control vector", "rows"]
    path: Path
    """Path of the safetensors, GGUF or JSON lines file."""
    dtype: str
    """Dtype of the vectors."""
    tensors: int
    """Number of sites, of vectors of the direction, or of features."""
    vectors: int
    """Number of vectors of each site."""
    bytes: int
    """Size of the file."""
    site: str | None = None
    """As in the line, like `at` and `run`; None for a direction."""
    at: str | None = None
    run: str | None = None
    direction: str | None = None
    """As in the line."""
    rows: int | None = None
    """Number of rows with a vector, or that were read for features; None for a direction."""
    rows_path: Path | None = None
    """Path of the file with a line of JSON for each row: its number and its text. None for means
    and directions."""
    note: str = ""
    """Which direction was selected, and what is left out, if anything; of features, how many are
    active and how much of the variance the basis explains."""

    @property
    def line(self) -> str:
        """Summary printed below the tables."""
        size = format_size(self.bytes)
        if self.direction is not None:
            vectors = count_noun(self.tensors, "vector")
            form = " as a control vector of llama.cpp" if self.kind == "control vector" else ""
            note = f"; {self.note}" if self.note else ""
            return (
                f"{self.experiment}: direction {self.direction}: {vectors} ({size}) as "
                f"{self.dtype} written to {self.path}{form}{note}"
            )
        if self.kind == "rows":
            return (
                f"{self.experiment}: rows of {self.site} of {self.run} at {self.at}: "
                f"{count_noun(self.tensors, 'feature')} in {count_noun(self.rows or 0, 'row')} "
                f"with {count_noun(self.vectors, 'token')} ({size}) written to {self.path}; "
                f"{self.note}"
            )
        sites = count_noun(self.tensors, "site")
        what, rows = f"{self.site} of {self.run} at {self.at}", count_noun(self.rows or 0, "row")
        if self.rows_path is None:
            means = count_noun(self.vectors, "mean")
            return (
                f"{self.experiment}: mean of {what}: {means} of {sites} (over {rows}, {size}) as "
                f"{self.dtype} written to {self.path}"
            )
        amount = f"{count_noun(self.vectors, 'vector')} of {sites} ({rows}, {size})"
        return (
            f"{self.experiment}: {what}: {amount} as {self.dtype} written to {self.path}, rows to "
            f"{self.rows_path.name}"
        )


CARD_FILE = "fit.json"
"""Facts about a training, in its folder."""

ROTATION_FILE = "rotation.safetensors"
"""The directions of a trained rotation, in its folder."""

LISTED_SITES = 8
"""Chosen sites of a mask that a table lists."""

MASK_FILE = "mask.json"
"""The sites of a trained mask with their probabilities, or the edges of a circuit with their
scores, in its folder."""


LENS_FILE = "lens.safetensors"
"""The maps of a trained lens, in its folder, as `tuned_lens("…")` reads them."""

PROBE_FILE = "probe.safetensors"
"""The maps of a trained probe, in its folder."""

VECTOR_FILE = "vector.safetensors"
"""A trained vector, edit or trained scales, in its folder."""


@dataclass(frozen=True)
class FitReport:
    """What is known of every training."""

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


@dataclass(frozen=True)
class TrainingReport(FitReport):
    """What a training led to, on vectors of rows that it didn't use."""

    vectors: int
    """Vectors of the training rows."""
    held_out_vectors: int
    """Vectors that the following numbers are computed on; 0: on the training vectors."""
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


@dataclass(frozen=True)
class DecoderReport(TrainingReport):
    """What a training on the decoder of a dictionary led to; its rows are decoder directions."""

    normal_explained: float
    """`explained` of a dictionary of the same size, trained in the same way on normal vectors with
    the mean and the covariance of the training vectors, for as many held-out normal vectors."""


@dataclass(frozen=True)
class IndependenceReport(FitReport):
    """How independent components are, on vectors of rows that the training didn't use."""

    vectors: int
    """Vectors of the training rows."""
    held_out_vectors: int
    explained: float
    """Share of the variance of the held-out vectors; without any, of the training vectors, as in
    the following numbers. As many principal components of the training vectors explain as much."""
    kurtosis: float
    """Median over the components of the size of the excess kurtosis of their coordinates."""
    untrained_kurtosis: float
    """The same for the first, random rotation of the whitened vectors."""
    components_kurtosis: float
    """The same for as many principal components."""


@dataclass(frozen=True)
class CorrelationReport(FitReport):
    """How coordinates of two sets of vectors correlate, on rows that the training didn't use."""

    vectors: int
    """Vectors of the training rows."""
    held_out_vectors: int
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
    def summary(self) -> str:
        """What the table doesn't say, as text."""
        return (
            f"correlations {self.listed}; explains {self.explained:.3f} of the variance of these "
            f"vectors; {self.numbers:.1f} weights of a component aren't 0"
        )

    @property
    def listed(self) -> str:
        """The correlations, as text."""
        shown = ", ".join(f"{each:.3f}" for each in self.correlations[:LISTED_SITES])
        more = len(self.correlations) - LISTED_SITES
        return shown if more <= 0 else f"{shown} and {more} more"


@dataclass(frozen=True)
class MixtureReport(FitReport):
    """How likely a mixture is, on vectors of rows that the training didn't use."""

    vectors: int
    """Vectors of the training rows."""
    held_out_vectors: int
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


@dataclass(frozen=True)
class RotationReport(FitReport):
    """What the training of a rotation led to: means of its measure over rows that it didn't use."""

    objective: str
    """`maximise logit(answer of fewer)`."""
    directions: int
    trained: float
    """The measure while the trained subspace is patched."""
    untrained: float
    """The same for the first, random subspace of the same size."""
    unpatched: float
    """The measure of the clean run."""
    whole: float
    """The measure while the whole vector is patched."""


@dataclass(frozen=True)
class VectorReport(FitReport):
    """What the training of a vector led to: means of its measure over rows that it didn't use."""

    objective: str
    """`maximise logit(answer)`."""
    length: float
    """Length of the vector."""
    site_length: float
    """Mean length of the vectors that it is added to, in the clean run."""
    trained: float
    """The measure while the trained vector is added."""
    random: float
    """The mean of the same over random vectors of the same length."""
    unsteered: float
    """The measure of the clean run."""
    difference: float | None
    """The measure while the mean difference between the run `from` and the clean run is added, over
    training rows and with the same length; None without `from`."""


@dataclass(frozen=True)
class SoftPromptReport(FitReport):
    """What the training of a soft prompt led to: means of its measure over rows that it didn't
    use."""

    objective: str
    """`maximise logprob(answer)`."""
    tokens: int
    """Number of vectors."""
    length: float
    """Mean length of the vectors."""
    site_length: float
    """Mean length of those that they replace, such as the embeddings of placeholders."""
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


@dataclass(frozen=True)
class EditReport(FitReport):
    """What the training of an edit led to: means of its measure over rows that it didn't use."""

    objective: str
    """`maximise logit(answer)`."""
    rank: int
    """Number of directions that it adds."""
    length: float
    """Mean length of the vectors that it adds in the rows of the training."""
    site_length: float
    """Mean length of the vectors that it adds them to."""
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


@dataclass(frozen=True)
class ScaleReport(FitReport):
    """What the training of scales led to: means of its measure over rows that it didn't use."""

    objective: str
    """`maximise logit(answer)`."""
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


@dataclass(frozen=True)
class LensReport(FitReport):
    """What the training of a lens led to: for each layer, means of KL(p ‖ q) in nats over vectors
    of rows that it didn't use, where p is the model's distribution over next tokens."""

    vectors: int
    """Vectors of the training rows, of one layer."""
    held_out_vectors: int
    """Vectors that the following numbers are computed on; 0: on training vectors."""
    layers: list[int]
    trained: list[float]
    """q: the distribution of the trained lens."""
    untrained: list[float]
    """q: that of the logit lens, from which the training starts."""
    average: float
    """q: the mean of p over training vectors, which no vector is read for."""


@dataclass(frozen=True)
class ProbeReport(FitReport):
    """How well a probe predicts, in each of its layers, on rows that it wasn't trained on: the
    accuracy for a class, R² for a number, None if it isn't defined."""

    predicts: str
    """The value, as the file names it."""
    unit: str
    """`accuracy` or `R²`."""
    distinct_rows: int
    """Training rows with different inputs up to the position."""
    layers: list[int | None]
    """None for a site without layers."""
    trained: list[float | None]
    shuffled: list[float | None]
    """The same for the probe of shuffled training values."""
    random: list[float | None]
    """The mean of the same over probes of one random direction of the vectors."""
    draws: int
    """Number of random directions."""
    constant: float | None
    """The same for the most common class, or the mean, of training rows."""


@dataclass(frozen=True)
class MaskReport(FitReport):
    """What the training of a mask led to: means of its measure over rows that it didn't use, with 0
    and 1 instead of the values of gates."""

    objective: str
    """`maximise logit(answer of fewer)`."""
    chosen: dict[str, float]
    """The chosen sites, positions, features, dimensions or edges with the probabilities of their
    gates."""
    candidates: int
    """Number of those that it chooses from."""
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

    def list_chosen(self) -> str:
        """Return `L2H0.z (0.89), L3H1.z (0.99)`, at most `LISTED_SITES` of them."""
        listed = [f"{name} ({likely:.2f})" for name, likely in self.chosen.items()]
        more = len(listed) - LISTED_SITES
        if more <= 0:
            return ", ".join(listed)
        least = min(self.chosen.values())
        text = ", ".join(listed[:LISTED_SITES])
        return f"{text} and {more} more, with probabilities from {least:.2f}"


@dataclass(frozen=True)
class CircuitReport(FitReport):
    """What the search for a circuit by scores of edges led to: means of its measure over rows that
    it didn't use."""

    objective: str
    """`minimise kl(clean)`."""
    chosen: dict[str, float]
    """The edges of the circuit with their scores, in descending order of their sizes: the change of
    the measure, on training rows, if the edge carries the other value."""
    candidates: int
    """Number of edges of the model."""
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

    def list_chosen(self) -> str:
        """Return `L1H1 -> logits (-0.89), embed -> L1H1.k (0.12)`, at most `LISTED_SITES`."""
        listed = [f"{name} ({score:.3g})" for name, score in self.chosen.items()]
        more = len(listed) - LISTED_SITES
        text = ", ".join(listed[:LISTED_SITES])
        return text if more <= 0 else f"{text} and {more:,} more"


Report = (
    TrainingReport
    | DecoderReport
    | IndependenceReport
    | CorrelationReport
    | MixtureReport
    | RotationReport
    | VectorReport
    | SoftPromptReport
    | EditReport
    | ScaleReport
    | MaskReport
    | CircuitReport
    | LensReport
    | ProbeReport
)


@dataclass(frozen=True)
class TrainedFit:
    """A dictionary, a rotation, a vector, an edit, scales, a lens, a probe or a mask that a file
    declares with `fit(…)`, trained."""

    basis: str
    """The basis, the direction, the lens, the probe, or the group of a mask; one member of a
    family as `f[layer 3]`."""
    what: str
    """`topk SAE with k 8`, `das rotation with 2 directions`."""
    site: str
    """`L1.resid_post`."""
    folder: Path
    """Its folder in the store: of a dictionary, in a layout that `sae("…")` or `transcoder("…")`
    reads; of a rotation, with a file that `saved("…/rotation.safetensors", "rotation")` reads, of a
    vector or scales `saved("…/vector.safetensors", "vector")`, of an edit
    `saved("…/vector.safetensors", "edit")`, of a lens `tuned_lens("…/lens.safetensors")`, and of a
    probe `probe.safetensors`."""
    report: Report
    """How well it was trained, next to controls."""
    seconds: float
    """How long the training took; 0 if it was trained before."""
    seed: int
    """Seed of the training."""
    family: str | None = None
    """Of one of the trainings of `fit(…, seeds: 3)`: its name without the seed."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {**asdict(self), "folder": str(self.folder), "report": asdict(self.report)}


@dataclass(frozen=True)
class StoredTraining:
    """What a file declared with `fit(…)`, in a store: finished, or with a checkpoint."""

    key: str
    name: str
    """Name of the basis, direction or group."""
    trainer: str
    file: str
    """Name of the `.mech` file."""
    model: str
    prompts: str
    finished: bool
    ended: datetime
    """When it ended or was interrupted."""
    size: int
    """Bytes of its folder."""
    folder: Path

    @property
    def short_key(self) -> str:
        """The beginning of the key, as tables show it."""
        return self.key[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {**asdict(self), "ended": self.ended.isoformat(), "folder": str(self.folder)}


NUMERIC_VERSION = 8
"""Version of results. Raise it with every change that alters some file's numbers beyond the last
bits. Until then, a run reads values from the store that the previous code computed.
`tests/execute/test_numeric_version.py` detects such changes."""

TRAINING_VERSION = 4
"""Version of trained weights. Raise it with every change that alters them."""
