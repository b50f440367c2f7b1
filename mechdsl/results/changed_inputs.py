"""What went into two runs, as far as it differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mechdsl.results.experiment_result import ExperimentResult, FileResult
from mechdsl.results.matched_runs import matched_measures, matched_rows
from mechdsl.results.results import Results

OF_STATISTICS = frozenset(
    {
        "accuracy",
        "correction",
        "effect",
        "inert",
        "interval",
        "null band",
        "p",
        "passes",
        "population",
        "rounding",
        "rows",
        "seed",
    }
)
"""Conventions that say how numbers came about of what was measured, or that stand elsewhere."""


@dataclass(frozen=True)
class InputChange:
    """Something that went into the runs; None where one of them has none of it."""

    what: str
    old: str | None
    new: str | None
    experiments: tuple[str, ...] = ()
    """Those that it is an input of; empty where it is one of all."""


@dataclass(frozen=True)
class RowChange:
    """Rows of one experiment that are in one run alone, by their contents."""

    experiment: str
    old: int
    """Rows in the old run."""
    new: int
    common: int
    added: tuple[int, ...]
    """Numbers of the rows that the new run has more."""
    removed: tuple[int, ...]
    """The same of the old run."""


def changed_inputs(
    old: Results,
    new: Results,
    files: Sequence[tuple[FileResult, FileResult]],
    pairs: Sequence[tuple[str, ExperimentResult, ExperimentResult]],
    options: tuple[Mapping[str, str] | None, Mapping[str, str] | None],
) -> Iterator[InputChange]:
    """Text, options, seed, pass sizes, what experiments read, versions.

    pairs: the name of an experiment, and its result in both runs. options: what both runs were
    asked for beside the file (parameters, a limit); None where that isn't known.
    """
    for one, two in files:
        yield from _differing(_of_file(one), _of_file(two))
    one, two = options
    if one is not None and two is not None:
        yield from _differing(one, two)
    found: dict[tuple[str, str | None, str | None], list[str]] = {}
    for name, one, two in pairs:
        for change in _of_pair(one, two):
            found.setdefault((change.what, change.old, change.new), []).append(name)
    for key, names in found.items():
        yield InputChange(*key, () if len(names) == len(pairs) else tuple(names))
    for change in _differing(old.versions, new.versions):
        yield InputChange(f"version of {change.what}", change.old, change.new)


def _differing(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[InputChange]:
    for what in dict.fromkeys([*new, *old]):
        if old.get(what) != new.get(what):
            yield InputChange(what, old.get(what), new.get(what))


def _of_file(file: FileResult) -> dict[str, str]:
    found = {"text of the file": file.hash, "seed": str(file.seed)}
    if file.sizes is not None:
        sizes = file.sizes
        found["pass sizes"] = f"{sizes.pass_tokens:,} tokens, prompts {sizes.prompt_tokens:,}"
    return found


def _of_pair(old: ExperimentResult, new: ExperimentResult) -> Iterator[InputChange]:
    yield from _differing(_of_experiment(old), _of_experiment(new))
    for one, two in matched_measures(old, new):
        before, after = old.measures[one], new.measures[two]
        if before.metric != after.metric:
            yield InputChange(f"metric of {after.label}", before.metric, after.metric)


def _of_experiment(result: ExperimentResult) -> dict[str, str]:
    found = {"model's name": result.model, "runs": result.direction}
    if result.settings is not None:
        own = result.settings
        by = "" if own.verdicts == "none" else f" verdicts {own.verdicts}"
        by += "" if own.by is None else f" by {own.by}"
        found["stats"] = (
            f"bootstrap({own.resamples}) confidence {own.confidence:g} correct {own.correction} "
            f"test {own.test}{by}"
        )
    for what, digest in result.hashes.items():
        found[f"{what} (SHA-256)"] = digest
    others = {k: text for k, text in result.conventions.items() if k not in OF_STATISTICS}
    return {**found, **others}


def row_change(name: str, old: ExperimentResult, new: ExperimentResult) -> RowChange | None:
    """None where both runs have the same rows."""
    found = matched_rows(old, new)
    if not found.added and not found.removed:
        return None
    return RowChange(
        name,
        old.prompts,
        new.prompts,
        len(found),
        tuple(_number(new, place) for place in found.added),
        tuple(_number(old, place) for place in found.removed),
    )


def _number(result: ExperimentResult, place: int) -> int:
    return place if result.row_ids is None else result.row_ids[place]
