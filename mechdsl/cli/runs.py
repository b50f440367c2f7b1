"""`mechdsl runs`: the runs that a store keeps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mechdsl.cli.options import format_option
from mechdsl.cli.output import make_console, print_diagnostics, say
from mechdsl.cli.status import FINE, WRONG
from mechdsl.cli.streams import write_json

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from mechdsl.results.results import Results
    from mechdsl.results.run_facts import RunFacts

DEFAULT = "list"


class RunCommands(click.Group):
    """Its commands; `list` where none is named. What they refuse is printed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        helped = args and args[0] in ("-h", "--help")
        named = args and not args[0].startswith("-")
        if not helped and not named and not ctx.resilient_parsing:  # as for completion
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        from mechdsl.diagnostics.raised import MechdslError

        try:
            return super().invoke(ctx)
        except MechdslError as error:
            print_diagnostics(error.diagnostics)
            return WRONG


class RunName(click.ParamType[str]):
    """What a run is called by."""

    name = "run"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        from mechdsl.cli.options import MechFile
        from mechdsl.diagnostics.raised import MechdslError
        from mechdsl.results.kept_runs import runs_in
        from mechdsl.results.named_runs import LAST, folder_of

        try:
            found = [run.id for run in runs_in(folder_of(None, ctx.params.get("store")))]
        except MechdslError:
            found = []
        begun = [CompletionItem(id) for id in [LAST, *found] if id.startswith(incomplete)]
        return [*begun, *MechFile().shell_complete(ctx, param, incomplete)]


class Size(click.ParamType[int]):
    """`5GB`, in bytes."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> int:
        from mechdsl.base.byte_sizes import bytes_of

        if isinstance(value, int):
            return value
        found = bytes_of(value)
        if found is None:
            self.fail(f"`{value}` isn't a size such as `5GB` or `500MB`", param, ctx)
        return found


store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    metavar="DIR",
    is_eager=True,  # so that completion knows it
    help="The store's folder.  [default: .mechdsl of the working folder, or beside the .mech file]",
)
run_argument = click.argument("run", type=RunName())


@click.group(cls=RunCommands, short_help="List, show, export or remove the runs that are kept.")
def runs() -> None:
    """The runs that a store keeps; alone, a list of them.

    RUN is an id or the beginning of one, `last`, a .mech file (its latest finished run), or, for
    `show`, a folder that `--out` has made.
    """


@runs.command(DEFAULT)
@store_option
@format_option("table", "json")
def list_runs(store: Path | None, form: str) -> int:
    """List the runs, the newest first."""
    from mechdsl.results.kept_runs import Runs, runs_in
    from mechdsl.results.named_runs import folder_of, has_store

    folder = folder_of(None, store)
    found = Runs() if store is None and not has_store(folder) else runs_in(folder)
    if form == "json":
        from mechdsl.base.visible import json_text

        write_json(json_text([each.facts.as_json() for each in found], 2))
    elif found:
        from mechdsl.show.runs import print_runs

        print_runs([each.facts for each in found], make_console())
    else:
        say(f"no runs are kept in {folder}", out=False)
    return FINE


@runs.command()
@run_argument
@store_option
@format_option("table", "json", "csv")
def show(run: str, store: Path | None, form: str) -> int:
    """Print what is known of a run, and its tables and verdicts again."""
    from mechdsl.base.visible import visible
    from mechdsl.results.archive import DOCUMENT, ArchiveProblem, OtherVersion, unpack
    from mechdsl.results.named_runs import (
        content_of,
        find_run,
        folder_of,
        names_export,
        open_store,
        results_of,
        unreadable,
    )
    from mechdsl.results.run_facts import facts_of, with_hashes

    if names_export(run):
        return _print(results_of(run), form)
    with open_store(folder_of(run, store)) as opened:
        stored = find_run(opened, run)
        if form == "table" and stored.state != "finished":
            return _print_facts(facts_of(stored))
        content = content_of(opened, stored)
    try:
        results = unpack(content)
    except OtherVersion as error:
        if form != "json" or DOCUMENT not in content:
            raise unreadable(stored, error) from error
        write_json(visible(content[DOCUMENT].decode("utf-8", "replace").rstrip()))
        return FINE
    except ArchiveProblem as error:
        raise unreadable(stored, error) from error
    if form == "table":
        _print_facts(with_hashes(facts_of(stored), results))
    return _print(results, form)


def _print_facts(facts: RunFacts) -> int:
    from mechdsl.show.runs import print_facts

    print_facts(facts, make_console())
    return FINE


def _print(results: Results, form: str) -> int:
    print_diagnostics(results.diagnostics)
    if form == "json":
        write_json(results.to_json())
    elif form == "csv":
        sys.stdout.write(results.to_csv())
    else:
        from mechdsl.show.runs import print_results

        print_results(results, make_console())
    return FINE


@runs.command("rm")
@click.argument("run", nargs=-1, required=True, type=RunName())
@store_option
def remove(run: tuple[str, ...], store: Path | None) -> int:
    """Remove runs. The values that they computed stay, for other runs; `gc` removes them."""
    from mechdsl.results.kept_runs import Run
    from mechdsl.results.named_runs import find_run, folder_of, open_store

    found: dict[str, Run] = {}
    for name in run:  # all of them, before the first one goes
        folder = folder_of(name, store)
        with open_store(folder) as opened:
            stored = find_run(opened, name)
        found[stored.id] = Run(folder, stored)
    for each in found.values():
        each.remove()
        say(f"removed {each.id} ({each.file})")
    return FINE


@runs.command(short_help="Remove what nothing refers to any more.")
@store_option
@click.option(
    "--limit",
    type=Size(),
    metavar="SIZE",
    help="Remove what wasn't used for longest, until this much is left: 5GB.",
)
def gc(store: Path | None, limit: int | None) -> int:
    """Remove what nothing refers to any more, and unfinished runs that are a month old."""
    from mechdsl.base.byte_sizes import size_text
    from mechdsl.base.plural import plural
    from mechdsl.results.named_runs import folder_of, open_store, store_refused
    from mechdsl.store.store import StoreProblem

    folder = folder_of(None, store)
    with open_store(folder) as opened:
        try:
            swept = opened.gc(limit)
        except (StoreProblem, OSError) as error:
            raise store_refused(folder, error) from error
    passes = "1 pass" if swept.blocks == 1 else f"{swept.blocks:,} passes"
    went = f"{plural(swept.runs, 'run')} and the values of {passes}"
    say(f"removed {went}: {size_text(swept.bytes)}; {size_text(swept.left)} are left")
    return FINE


@runs.command(short_help="Write a run into a folder, as `run --out` does.")
@run_argument
@click.argument("folder", type=click.Path(path_type=Path))
@store_option
def export(run: str, folder: Path, store: Path | None) -> int:
    """Write a run into a folder in FOLDER, which is called like its file, as `run --out` does."""
    from mechdsl.results.kept_runs import Run
    from mechdsl.results.named_runs import find_run, folder_of, open_store

    place = folder_of(run, store)
    with open_store(place) as opened:
        stored = find_run(opened, run)
    say(f"{stored.id} written to {Run(place, stored).export(folder)}")
    return FINE
