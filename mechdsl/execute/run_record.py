"""Options, pass sizes, counts and saved files of a run, without importing torch.

`results`, `show` and `cli` import this module at start-up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mechdsl.base.text import count_noun, format_size
from mechdsl.fits.reports import FitReport

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
    report: FitReport
    """How well it was trained, next to controls."""
    seconds: float
    """How long the training took; 0 if it was trained before."""
    seed: int
    """Seed of the training."""
    model: str
    """Name of the model that runs the rows."""
    family: str | None = None
    """Of one of the trainings of `fit(…, seeds: 3)`: its name without the seed."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {**asdict(self), "folder": str(self.folder), "report": asdict(self.report)}


def name_fits(fits: Sequence[TrainedFit]) -> list[str]:
    """Return the names of trainings: `c`, or `c (early)` and `c (late)` if two models have one."""
    counts = Counter(fit.basis for fit in fits)
    return [fit.basis if counts[fit.basis] == 1 else f"{fit.basis} ({fit.model})" for fit in fits]


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


NUMERIC_VERSION = 18
"""Version of results. Raise it with every change that alters some file's numbers beyond the last
bits. Until then, a run reads values from the store that the previous code computed.
`tests/execute/test_numeric_version.py` detects such changes."""

TRAINING_VERSION = 11
"""Version of trained weights. Raise it with every change that alters them."""
