"""Options of a run, arguments of the Python API, and their checks; without torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mechdsl.checks.file_check import CheckSettings
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.execute.run_record import ExecutionOptions

if TYPE_CHECKING:
    import torch

    from mechdsl.execute.run_record import ExecutionProfile
    from mechdsl.planner.plan import Plan
    from mechdsl.results.experiment_result import StopCondition


@dataclass(frozen=True)
class RunOptions:
    """Options for running a file; none of them changes the file's meaning."""

    settings: CheckSettings = field(default_factory=CheckSettings)
    device: str = "auto"
    dtype: str | None = None
    offload: Path | None = None
    """Folder for weights that fit neither on the device nor in memory, with accelerate."""
    out: Path | None = None
    without: frozenset[str] = frozenset()
    """Disabled graph and plan passes."""
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)
    ends: StopCondition | None = None
    """Stop condition of `fail_fast`; experiments then run one by one."""
    on_profile: Callable[[Plan, ExecutionProfile], None] | None = None
    """Called after the run with the plan and the measured work."""
    store: Path | None = None
    """Folder of the store; None for a run without one."""
    hashes: bool = True
    """Whether the results need the hashes of weights. With a store they are always computed,
    because its keys need them."""
    fresh: bool = False
    """Recompute everything, and replace the stored values."""
    fits: bool = False
    """Whether all trainings of the file were tried before the run, as with `run --fit`."""


def to_names(names: Sequence[str]) -> frozenset[str]:
    """Return names as a set; a single word is one name, not its letters."""
    return frozenset([names] if isinstance(names, str) else names)


def dtype_name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def word_problem(
    name: str, word: str, known: Sequence[str] | Mapping[str, object]
) -> list[Diagnostic]:
    if word in known:
        return []
    hint = did_you_mean(word, known, f"write one of {', '.join(known)}")
    return [BadCommandLine(reason=f"`{name}={word!r}`: there is no such {name}", hint=hint)]


def measure_problem(value: object) -> list[Diagnostic]:
    """Report a `measure` that isn't a text, such as a model passed in its place."""
    if value is None or isinstance(value, str):
        return []
    reason = f"`measure` is of the type {type(value).__name__}, not a text"
    return [BadCommandLine(reason=reason, hint="name the models: `models={…}`")]


def dtype_problem(dtype: str | torch.dtype | None) -> list[Diagnostic]:
    from mechdsl.program.models import MODEL_DTYPES

    return [] if dtype is None else word_problem("dtype", dtype_name(dtype), MODEL_DTYPES)


def size_problems(
    limit: int | None, pass_tokens: int | None = None, prompt_tokens: int | None = None
) -> list[Diagnostic]:
    given = {"limit": limit, "pass_tokens": pass_tokens, "prompt_tokens": prompt_tokens}
    return [
        BadCommandLine(
            reason=f"`{name}={value!r}`: it must be a whole number of at least 1",
            hint="omit it for no limit",
        )
        for name, value in given.items()
        if value is not None and (type(value) is not int or value < 1)
    ]


def store_problem(store: object, fresh: bool) -> list[Diagnostic]:
    if store is False and fresh:
        said = "`store=False` and `fresh=True` contradict each other"
        return [BadCommandLine(reason=said, hint="without a store, everything is recomputed")]
    if store is None or store is False or isinstance(store, str | Path):
        return []
    hint = "name a folder; `False` disables the store, and `None` uses the store next to the file"
    return [BadCommandLine(reason=f"`store={store!r}`: it must be a folder", hint=hint)]


def check_folders(options: RunOptions) -> list[Diagnostic]:
    """Report E0208 for folders that can't be written, and for a missing library."""
    problems: list[Diagnostic] = []
    for option, folder in (("--out", options.out), ("--offload", options.offload)):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = f"`{option} {folder}`: {(error.strerror or str(error)).lower()}"
            hint = "name a writable folder; a missing folder is created"
            problems.append(BadCommandLine(reason=reason, hint=hint))
    if options.offload is not None and find_spec("accelerate") is None:
        reason = "`--offload` needs accelerate, which isn't installed"
        hint = "`pip install 'mechdsl[offload]'` installs it"
        problems.append(BadCommandLine(reason=reason, hint=hint))
    return problems
