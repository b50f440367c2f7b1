"""`save` lines: activations, gradients, rows of features and directions, written to files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.syntax import BadArgument, NotSupported, UnknownWord
from mechdsl.program import spec
from mechdsl.program.measures import lower_measure
from mechdsl.program.spec import whole_number_value
from mechdsl.program.statements import Statements, resolve_run_name
from mechdsl.syntax import ast

SAVE_DTYPES = ("float16", "bfloat16", "float32")
"""Dtypes of saved activations."""

SAVE_SUFFIX = ".safetensors"

ROWS_SUFFIX = ".jsonl"

CONTROL_VECTOR_SUFFIX = ".gguf"


def lower_saves(work: Statements, prompts: spec.Prompts) -> tuple[spec.Save, ...]:
    """Lower the `save` lines of an experiment.

    Codes: E0108 with `keep`, and with rules unless a run is named; E0201 for unknown runs, E0203
    for dtypes, E0207 for files of another type and for features without a number of rows.
    """
    _reject_unstreamed(work, prompts)
    unsaid = [save for save in work.saves if save.run is None]
    for save in unsaid[:1] if work.rules else ():
        later = (
            "name the run: `save SITE of clean at …`; it can also be a `run NAME { … }` with rules"
        )
        what = "a `save` of the run that rules act on"
        work.diagnostics.append(NotSupported(span=save.span, what=what, later=later))
    for save in work.saves[:1]:
        if work.keep:
            later = "exclude rows with a `where` in the prompts block"
            work.diagnostics.append(
                NotSupported(span=save.span, what="a `save` together with `keep`", later=later)
            )
    saves: list[spec.Save] = []
    for save in work.saves:
        work.diagnostics.extend(_check_saved_file(save))
        problem = _check_saved_features(save, work)
        if problem is not None:
            work.diagnostics.append(problem)
            continue
        basis = save.site.basis_name or ast.STANDARD_BASIS
        if basis != ast.STANDARD_BASIS and not work.scope.use("basis", basis, save.site.span):
            continue
        run = None if save.run is None else resolve_run_name(save.run, prompts, work)
        saves.append(
            spec.Save(
                span=save.span,
                site=save.site,
                at=save.at,
                run=run,
                file=save.file.value,
                dtype=_saved_dtype(save.dtype, work),
                mean=save.mean,
                rows=whole_number_value(save.rows, work.parts.parameters),
                gradient=None
                if save.gradient is None
                else lower_measure(save.gradient, work.parts, work.scope),
            )
        )
    return tuple(saves)


def _reject_unstreamed(work: Statements, prompts: spec.Prompts) -> None:
    """Report E0207 for lines of an experiment that need all rows, if its rows are read in parts."""
    if not prompts.streamed:
        return
    for statement in work.definition.statements:
        match statement:
            case ast.UseModel():
                continue
            case ast.Save(rows=rows) if rows is not None:
                continue
            case ast.UsePrompts(limit=None, replies=None, prompts=refs) if all(
                ref.part is None for ref in refs
            ):
                continue
            case _:
                work.diagnostics.append(report_streamed_use(prompts, statement.span))


def report_streamed_use(prompts: spec.Prompts, span: Span) -> BadArgument:
    """Return E0207 for a use of rows that are read in parts."""
    return BadArgument(
        span=span,
        name=prompts.name,
        reason="has streamed rows, which only `save top … rows of …` and trained dictionaries read",
        hint="remove `streamed` from its `rows` line, or name other prompts here",
    )


def _check_saved_file(save: ast.Save) -> Iterator[Diagnostic]:
    """Report E0207 for the name of a file of another type, and for rows with a dtype."""
    of_rows = save.rows is not None
    suffix, kind = (ROWS_SUFFIX, "JSON lines") if of_rows else (SAVE_SUFFIX, "safetensors")
    if PurePath(save.file.value).suffix.lower() != suffix:
        yield BadArgument(
            span=save.file.span,
            name=save.file.value,
            reason=f"is not the name of a {kind} file",
            hint=f"use a name that ends in `{suffix}`",
        )
    if of_rows and save.dtype is not None:
        reason, hint = "has no effect on rows, which are saved as text", "remove `as …`"
        yield BadArgument(span=save.dtype.span, name=save.dtype.id, reason=reason, hint=hint)


def _check_saved_features(save: ast.Save, work: Statements) -> Diagnostic | None:
    """Return E0207 for rows of something other than features, and for vectors of features."""
    named, site = save.site.coordinates is not None, save.site.span.written
    if named != (save.rows is not None) or (save.rows is None and save.site.basis is not None):
        reason = "names features, of which rows are saved, not vectors"
        hint = f'write `save top 20 rows of {site} at tokens * to "rows{ROWS_SUFFIX}"`'
        if save.rows is not None:
            reason = "names no features of a basis"
            hint = "for example `save top 20 rows of features * of f at tokens * to …`"
        elif not named:
            hint = "name features: `save top 20 rows of features * of f at tokens * to …`"
        return BadArgument(span=save.site.span, name=site, reason=reason, hint=hint)
    count = whole_number_value(save.rows, work.parts.parameters)
    if save.rows is not None and (count is None or count < 1):
        reason, hint = "must be a whole number above 0", "write `save top 20 rows of …`"
        return BadArgument(span=save.span, name="top", reason=reason, hint=hint)
    return None


def _saved_dtype(dtype: ast.Name | None, work: Statements) -> str | None:
    """Return the dtype of `as TYPE`. Reports E0203."""
    if dtype is None:
        return None
    if dtype.id not in SAVE_DTYPES:
        hint = did_you_mean(dtype.id, SAVE_DTYPES, f"types are {', '.join(SAVE_DTYPES)}")
        work.diagnostics.append(
            UnknownWord(span=dtype.span, kind="type of numbers", word=dtype.id, hint=hint)
        )
    return dtype.id


def lower_saved_directions(work: Statements) -> tuple[spec.SavedDirection, ...]:
    """Lower the `save direction` lines of an experiment.

    Codes: E0201 for unknown directions, E0203 for dtypes, E0207 for files of another type and for a
    control vector with a dtype.
    """
    directions: list[spec.SavedDirection] = []
    for save in work.saved_directions:
        name = save.direction.id if isinstance(save.direction, ast.Name) else save.direction.name
        work.scope.use("direction", name, save.direction.span)
        dtype, suffix = _saved_dtype(save.dtype, work), PurePath(save.file.value).suffix.lower()
        reason, hint, span = "", "", save.file.span
        if suffix not in (SAVE_SUFFIX, CONTROL_VECTOR_SUFFIX):
            reason = "is not the name of a safetensors or GGUF file"
            hint = (
                f"use a name that ends in `{SAVE_SUFFIX}`, or in `{CONTROL_VECTOR_SUFFIX}` for a "
                "control vector of llama.cpp"
            )
        elif suffix == CONTROL_VECTOR_SUFFIX and save.dtype is not None:
            reason = "is a control vector, whose numbers are always float32"
            hint, span = f"remove `as {save.dtype.id}`", save.dtype.span
        if reason:
            work.diagnostics.append(
                BadArgument(span=span, name=save.file.value, reason=reason, hint=hint)
            )
        directions.append(
            spec.SavedDirection(
                span=save.span,
                direction=save.direction,
                name=name,
                file=save.file.value,
                dtype=dtype,
            )
        )
    return tuple(directions)


def reject_compared_saves(work: Statements, variants: Sequence[object]) -> None:
    """Report E0108 for saves in an experiment that compares blocks, models, sources or bases."""
    blocks = len(work.prompts[0].prompts) if work.prompts else 1
    saves = [*work.saves, *work.saved_directions]
    if len(variants) * blocks > 1 and saves:
        what = "a `save` in an experiment that compares several models, sources or bases"
        if blocks > 1:
            what = "a `save` in an experiment on several blocks of prompts"
        later = "write a separate experiment and file for each"
        work.diagnostics.append(NotSupported(span=saves[0].span, what=what, later=later))
