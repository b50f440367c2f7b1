"""`mechdsl plan`: the graph, and how much there is to run."""

from __future__ import annotations

from pathlib import Path

import click

from mechdsl.cli.mech_files import checked_file
from mechdsl.cli.options import (
    PassOptions,
    allow_outside_option,
    allow_python_option,
    file_argument,
    limit_option,
    pass_options,
    python_mode,
    set_option,
    settings,
    untrusted_option,
)
from mechdsl.cli.output import make_console, print_diagnostics
from mechdsl.cli.status import FINE, WRONG
from mechdsl.diagnostics.core import has_errors


@click.command(short_help="Print the graph, and how much there is to run.")
@file_argument
@set_option
@limit_option
@allow_python_option
@allow_outside_option
@untrusted_option
@pass_options
@click.option(
    "--measure",
    is_flag=True,
    help="Run base and source runs, and say in the metric's units what can be shown.",
)
def plan(
    file: Path,
    parameters: tuple[str, ...],
    limit: int | None,
    measure: bool,
    allow_python: bool,
    allow_outside: bool,
    untrusted: bool,
    passes: PassOptions,
) -> int:
    """Print the graph, cells, rows and passes of a file. `-` is standard input."""
    how = settings(
        parameters,
        limit,
        python=python_mode(allow_python),
        allow_outside=allow_outside,
        untrusted=untrusted,
    )
    checked, problems = checked_file(file, how)
    print_diagnostics(problems)
    if checked is None or has_errors(problems):
        return WRONG
    from mechdsl.plan.make_plan import make_plan
    from mechdsl.plan.passes import unknown_passes
    from mechdsl.plan.plan import PASS_TOKENS, PROMPT_TOKENS
    from mechdsl.show.plan import print_plan

    wrong = unknown_passes(passes.without)
    print_diagnostics(wrong)
    if wrong:
        return WRONG
    measured = None
    if measure:
        from mechdsl.execute.options import Options
        from mechdsl.loading.load import import_library
        from mechdsl.pipeline.compute import measure_unpatched
        from mechdsl.pipeline.run_options import RunOptions

        import_library()
        sizes = Options(pass_tokens=passes.pass_tokens, prompt_tokens=passes.prompt_tokens)
        measured, problems = measure_unpatched(checked, RunOptions(execution=sizes))
        print_diagnostics(problems)
        if has_errors(problems):
            return WRONG
    print_plan(
        make_plan(checked.experiments, without=frozenset(passes.without)),
        make_console(),
        passes.pass_tokens or PASS_TOKENS,
        passes.prompt_tokens or PROMPT_TOKENS,
        measured,
        saving=checked.saving,
    )
    return FINE
