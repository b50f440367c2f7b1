"""`mechdsl runs` and `mechdsl diff`: the runs in a store, and the difference between two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mechdsl.cli.arguments import format_option, safe_csv_option
from mechdsl.cli.output import (
    EXPECTATION_FAILED,
    INVALID_INPUT,
    SUCCESS,
    make_console,
    print_csv,
    print_diagnostics,
    print_json,
    print_line,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from mechdsl.results.results import Results
    from mechdsl.results.runs import RunFacts


DEFAULT_COMMAND = "list"


class RunCommands(click.Group):
    """The subcommands, `list` by default; prints their errors."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        helped = args and args[0] in ("-h", "--help")
        named = args and not args[0].startswith("-")
        if not helped and not named and not ctx.resilient_parsing:  # not during completion
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        from mechdsl.diagnostics.rendering import MechdslError

        try:
            return super().invoke(ctx)
        except MechdslError as error:
            print_diagnostics(error.diagnostics)
            return INVALID_INPUT


class RunNameType(click.ParamType[str]):
    """The name of a run."""

    name = "run"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        from mechdsl.cli.arguments import MechFile
        from mechdsl.diagnostics.rendering import MechdslError
        from mechdsl.results.runs import LAST_RUN, find_store_folder, load_runs

        try:
            ids = [run.id for run in load_runs(find_store_folder(None, ctx.params.get("store")))]
        except MechdslError:
            ids = []
        begun = [CompletionItem(id) for id in [LAST_RUN, *ids] if id.startswith(incomplete)]
        return [*begun, *MechFile().shell_complete(ctx, param, incomplete)]


class SizeType(click.ParamType[int]):
    """A size such as `5GB`, in bytes."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> int:
        from mechdsl.base.text import parse_size

        if isinstance(value, int):
            return value
        size = parse_size(value)
        if size is None:
            self.fail(f"`{value}` isn't a size such as `5GB` or `500MB`", param, ctx)
        return size


store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    metavar="DIR",
    is_eager=True,  # available to completion
    help="Store folder.  [default: .mechdsl in the working directory, or next to the .mech file]",
)

run_argument = click.argument("run", type=RunNameType())


@click.group(cls=RunCommands, short_help="List, show, export or remove stored runs.")
def runs() -> None:
    """The runs that a store keeps; alone, a list of them.

    RUN is an id or the beginning of one, `last`, a .mech file (its latest finished run), or, for
    `show`, a folder that `--out` has made.
    """


@runs.command(DEFAULT_COMMAND)
@store_option
@format_option("table", "json")
def list_runs(store: Path | None, form: str) -> int:
    """List the runs, the newest first."""
    from mechdsl.results.runs import Runs, find_store_folder, has_store, load_runs

    folder = find_store_folder(None, store)
    stored_runs = Runs() if store is None and not has_store(folder) else load_runs(folder)
    if form == "json":
        from mechdsl.base.text import dump_json

        print_json(dump_json([stored_run.facts.as_json() for stored_run in stored_runs], 2))
    elif stored_runs:
        from mechdsl.show.runs import print_runs

        print_runs([stored_run.facts for stored_run in stored_runs], make_console())
    else:
        print_line(f"{folder} has no stored runs", out=False)
    return SUCCESS


@runs.command()
@run_argument
@store_option
@format_option("table", "json", "csv")
@safe_csv_option
def show(run: str, store: Path | None, form: str, safe_csv: bool) -> int:
    """Print what is known of a run, and its tables and verdicts again."""
    from mechdsl.results.experiment_result import quote_formulas

    with quote_formulas(safe_csv):
        return _show(run, store, form)


def _show(run: str, store: Path | None, form: str) -> int:
    from mechdsl.base.text import escape_hidden
    from mechdsl.results.results import (
        DOCUMENT_FILE,
        ArchiveError,
        ArchiveVersionError,
        unpack_results,
    )
    from mechdsl.results.runs import (
        add_hashes,
        find_run,
        find_store_folder,
        is_export_name,
        load_archive,
        load_results,
        open_store,
        read_facts,
        unreadable_run_error,
    )

    if is_export_name(run):
        return _print(load_results(run), form)
    with open_store(find_store_folder(run, store)) as opened:
        stored = find_run(opened, run)
        if form == "table" and stored.state != "finished":
            return _print_facts(read_facts(stored))
        content = load_archive(opened, stored)
    try:
        results = unpack_results(content)
    except ArchiveVersionError as error:
        if form != "json" or DOCUMENT_FILE not in content:
            raise unreadable_run_error(stored, error) from error
        print_json(escape_hidden(content[DOCUMENT_FILE].decode("utf-8", "replace").rstrip()))
        return SUCCESS
    except ArchiveError as error:
        raise unreadable_run_error(stored, error) from error
    if form == "table":
        _print_facts(add_hashes(read_facts(stored), results))
    return _print(results, form)


def _print_facts(facts: RunFacts) -> int:
    from mechdsl.show.runs import print_facts

    print_facts(facts, make_console())
    return SUCCESS


def _print(results: Results, form: str) -> int:
    print_diagnostics(results.diagnostics)
    if form == "json":
        print_json(results.to_json())
    elif form == "csv":
        print_csv(results.to_csv())
    else:
        from mechdsl.show.runs import print_results

        print_results(results, make_console())
    return SUCCESS


@runs.command("rm")
@click.argument("run", nargs=-1, required=True, type=RunNameType())
@store_option
def remove(run: tuple[str, ...], store: Path | None) -> int:
    """Remove runs. The values that they computed stay, for other runs; `gc` removes them."""
    from mechdsl.results.runs import Run, find_run, find_store_folder, open_store

    chosen_runs: dict[str, Run] = {}
    for name in run:  # find all before removing the first one
        folder = find_store_folder(name, store)
        with open_store(folder) as opened:
            stored = find_run(opened, name)
        chosen_runs[stored.id] = Run(folder, stored)
    for each in chosen_runs.values():
        each.remove()
        print_line(f"removed {each.id} ({each.file})")
    return SUCCESS


@runs.command(short_help="Remove unreferenced data.")
@store_option
@click.option(
    "--limit",
    type=SizeType(),
    metavar="SIZE",
    help=(
        "Remove the least recently used data until the store is no larger than this, for "
        "example 5GB."
    ),
)
def gc(store: Path | None, limit: int | None) -> int:
    """Remove what nothing refers to any more, and unfinished runs that are a month old."""
    from mechdsl.base.text import count_noun, format_size
    from mechdsl.results.runs import find_store_folder, open_store, store_error
    from mechdsl.store.files import StoreProblem

    folder = find_store_folder(None, store)
    with open_store(folder) as opened:
        try:
            swept = opened.gc(limit)
        except (StoreProblem, OSError) as error:
            raise store_error(folder, error) from error
    passes = "1 pass" if swept.blocks == 1 else f"{swept.blocks:,} passes"
    went = f"{count_noun(swept.runs, 'run')} and the values of {passes}"
    print_line(f"removed {went} ({format_size(swept.bytes)}); {format_size(swept.left)} remain")
    return SUCCESS


@runs.command(short_help="List or remove trainings.")
@store_option
@click.option(
    "--remove",
    "keys",
    multiple=True,
    metavar="KEY",
    help="Remove the training whose key begins like this. Repeatable.",
)
@format_option("table", "json")
def trainings(store: Path | None, keys: tuple[str, ...], form: str) -> int:
    """List what `mechdsl fit` has trained, the newest first. Checkpoints of interrupted trainings
    are listed as `unfinished`."""
    from mechdsl.base.text import dump_json, format_size
    from mechdsl.pipeline.trained_files import list_trainings, remove_trainings
    from mechdsl.results.runs import find_store_folder

    folder = find_store_folder(None, store)
    if keys:
        removed, problems = remove_trainings(folder, keys)
        print_diagnostics(problems)
        for training in removed:
            print_line(
                f"removed {training.short_key} ({training.name}, {format_size(training.size)})"
            )
        return INVALID_INPUT if problems else SUCCESS
    stored_trainings = list_trainings(folder)
    if form == "json":
        print_json(dump_json([training.to_dict() for training in stored_trainings], 2))
    elif stored_trainings:
        from mechdsl.show.trainings import print_stored_trainings

        print_stored_trainings(stored_trainings, make_console())
    else:
        print_line(f"{folder} has no trainings", out=False)
    return SUCCESS


@runs.command(short_help="Write a run to a folder in the format of `run --out`.")
@run_argument
@click.argument("folder", type=click.Path(path_type=Path))
@store_option
def export(run: str, folder: Path, store: Path | None) -> int:
    """Write a run into a folder in FOLDER, which is called like its file, as `run --out` does."""
    from mechdsl.results.runs import Run, find_run, find_store_folder, open_store

    place = find_store_folder(run, store)
    with open_store(place) as opened:
        stored = find_run(opened, run)
    print_line(f"{stored.id} written to {Run(place, stored).export(folder)}")
    return SUCCESS


@click.command(short_help="Show what changed between two runs.")
@click.argument("old", metavar="OLD", type=RunNameType())
@click.argument("new", metavar="NEW", type=RunNameType())
@store_option
@format_option("table", "json")
def diff(old: str, new: str, store: Path | None, form: str) -> int:
    """Show what changed between two runs: inputs, verdicts, cells beyond noise.

    OLD and NEW are runs (an id or its beginning, `last`), `.mech` files (their latest finished
    run), or folders of `run --out`. Exit status 0 when nothing changed beyond noise, 1 when an
    effect did, an expectation that held fails, or something is gone; 2 when something is wrong.
    """
    from mechdsl.diagnostics.rendering import MechdslError
    from mechdsl.results.differences.comparison import diff_runs

    try:
        differences = diff_runs(old, new, store)
    except MechdslError as error:
        print_diagnostics(error.diagnostics)
        return INVALID_INPUT
    if form == "json":
        print_json(differences.to_json())
    else:
        from mechdsl.show.runs import print_differences

        print_differences(differences, make_console())
    return EXPECTATION_FAILED if differences.changed else SUCCESS
