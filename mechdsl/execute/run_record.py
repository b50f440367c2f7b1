"""Options, pass sizes, counts and saved files of a run, without importing torch.

`results`, `show` and `cli` import this module at start-up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mechdsl.base.text import count_noun, format_size

PaddingSide = Literal["left", "right"]

ProgressCallback = Callable[[int, int], None]
"""(rows done, rows in all)."""


@dataclass(frozen=True)
class ExecutionOptions:
    """How an execution goes about it; results don't depend on it but for their last bits."""

    side: PaddingSide | None = None
    """Where padding stands; None is where it is harmless to the model, on the left if it may be:
    prompts end in one column then, so that writes near the end need few columns."""
    on_progress: ProgressCallback | None = None
    pass_tokens: int | None = None
    """Most tokens of one pass over patched rows; chosen by device, free memory and measuring where
    none are given."""
    prompt_tokens: int | None = None
    """Most tokens of one batch of unpatched prompts; fewer than usual where memory is short and
    neither is given."""
    allow_nan: bool = False
    """Leave rows with NaN, or with an infinity that a metric can't use, out of everything. This one
    does change results."""


SizeOrigin = Literal["default", "given", "measured", "memory"]
"""What the size of a pass comes from; `memory`: there wasn't enough of it for another."""


@dataclass(frozen=True)
class PassSizes:
    """What a run was laid out by. Given both, another run of the same plan is laid out the same."""

    pass_tokens: int
    """Of one pass over patched rows, at most."""
    prompt_tokens: int
    """Of one batch of unpatched prompts, at most."""
    chosen: SizeOrigin
    """What `pass_tokens` comes from."""


@dataclass
class ExecutionProfile:
    """Counts and seconds of one execution."""

    rows: int = 0
    """Patched rows that could differ from the base run."""
    distinct: int = 0
    """Of these, how many were run: equal ones once."""
    estimated: int = 0
    """Rows whose values were estimated by gradients, and that weren't run."""
    known: int = 0
    """Patched rows whose values the store had before the run."""
    resumed: int = 0
    """Of `rows` and `estimated`, those that the run computed before it was cut short."""
    not_kept: dict[str, str] = field(default_factory=dict[str, str])
    """By key, the experiments whose values the store can't keep → why."""
    unpatched_passes: int = 0
    """Forward passes over batches of unpatched prompts."""
    passes: int = 0
    """Forward passes over rows."""
    tokens: list[int] = field(default_factory=list[int])
    """Of every pass, the tokens of its rows."""
    halved: int = 0
    """How often a pass ran out of memory and was tried again at half the size."""
    unpatched_seconds: float = 0.0
    patched_seconds: float = 0.0

    def passed(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens took so long."""
        self.passes += 1
        self.tokens.append(tokens)
        self.patched_seconds += seconds


@dataclass
class RowCounts:
    """Rows of cells, each once for every rule that they are run with."""

    computed: int = 0
    stored: int = 0
    """Those whose values came from the store."""
    not_kept: dict[str, str] = field(default_factory=dict[str, str])
    """By key, the experiments whose values the store can't keep → why."""

    def add(self, profile: ExecutionProfile) -> None:
        """What one execution did."""
        self.computed += profile.rows + profile.estimated - profile.resumed
        self.stored += profile.known + profile.resumed
        self.not_kept.update(profile.not_kept)


@dataclass(frozen=True)
class SavedFile:
    """One file of activations."""

    experiment: str
    site: str
    """As the line says it, and so are `at` and `run`."""
    at: str
    run: str
    path: Path
    """Of the safetensors file."""
    rows_path: Path
    """Of what stands beside it: a line of JSON for each row, with its number and its text."""
    dtype: str
    """Of the vectors' numbers."""
    tensors: int
    """Sites."""
    vectors: int
    """Of each site."""
    rows: int
    """With a vector."""
    bytes: int
    """Of the safetensors file."""

    @property
    def line(self) -> str:
        """What is said of it below the tables."""
        sites, vectors = count_noun(self.tensors, "site"), count_noun(self.vectors, "vector")
        amount = f"{vectors} of {sites} ({count_noun(self.rows, 'row')}, {format_size(self.bytes)})"
        return (
            f"{self.experiment}: {self.site} of {self.run} at {self.at}: {amount} as {self.dtype} "
            f"written to {self.path}, rows to {self.rows_path.name}"
        )


NUMERIC_VERSION = 5
"""To be raised by hand with every change after which some file gives other numbers, beyond the
last bits: then nothing of before is read from a store. A test of the store says when that is."""
