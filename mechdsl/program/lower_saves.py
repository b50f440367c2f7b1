"""`save` lines: activations that an experiment writes to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import BadArgument, UnknownWord, did_you_mean
from mechdsl.program import spec
from mechdsl.program.lower_other_runs import run_of
from mechdsl.program.sort_statements import Statements

DTYPES = ("float16", "bfloat16", "float32")
"""What activations can be saved as."""
SUFFIX = ".safetensors"


def lower_saves(work: Statements, prompts: spec.Prompts) -> tuple[spec.Save, ...]:
    """The `save` lines of an experiment.

    E0108 beside rules, where no run is named, and beside `keep`, E0201 for runs that there are
    not, E0203 for types, E0207 for files of another kind.
    """
    unsaid = [save for save in work.saves if save.run is None]
    for save in unsaid[:1] if work.rules else ():
        later = "say which run: `save SITE of clean at …`; rules of a `run NAME { … }` count too"
        what = "a `save` of the run that rules act on"
        work.diagnostics.append(NotSupported(span=save.span, what=what, later=later))
    for save in work.saves[:1]:
        if work.keep:
            later = "leave rows out by a `where` in the prompts block"
            work.diagnostics.append(
                NotSupported(span=save.span, what="a `save` beside `keep`", later=later)
            )
    found: list[spec.Save] = []
    for save in work.saves:
        file, dtype = save.file.value, save.dtype
        if PurePath(file).suffix.lower() != SUFFIX:
            work.diagnostics.append(
                BadArgument(
                    span=save.file.span,
                    name=file,
                    reason="is no name of a safetensors file",
                    hint=f"let it end in `{SUFFIX}`",
                )
            )
        if dtype is not None and dtype.id not in DTYPES:
            hint = did_you_mean(dtype.id, DTYPES, f"types are {', '.join(DTYPES)}")
            work.diagnostics.append(
                UnknownWord(span=dtype.span, kind="type of numbers", word=dtype.id, hint=hint)
            )
        run = None if save.run is None else run_of(save.run, prompts, work)
        found.append(
            spec.Save(
                span=save.span,
                site=save.site,
                at=save.at,
                run=run,
                file=file,
                dtype=None if dtype is None else dtype.id,
            )
        )
    return tuple(found)


def one_file(work: Statements, variants: Sequence[object]) -> None:
    """E0108 where an experiment that saves compares several blocks, models, sources or bases."""
    blocks = len(work.prompts[0].prompts) if work.prompts else 1
    if len(variants) * blocks > 1 and work.saves:
        what = "a `save` in an experiment that compares several models, sources or bases"
        if blocks > 1:
            what = "a `save` in an experiment on several blocks of prompts"
        later = "write an experiment for each, with a file of its own"
        work.diagnostics.append(NotSupported(span=work.saves[0].span, what=what, later=later))
