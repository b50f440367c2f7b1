"""`mechdsl fmt`: bring files into canonical form."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from mechdsl.base.files import write_whole
from mechdsl.cli.mech_files import mech_files
from mechdsl.cli.options import files_argument
from mechdsl.cli.output import print_diagnostics, say
from mechdsl.cli.status import FINE, WRONG
from mechdsl.diagnostics.core import has_errors


@click.command()
@files_argument
@click.option("--check", is_flag=True, help="Change nothing; exit status 2 if it would.")
def fmt(files: tuple[Path, ...], check: bool) -> int:
    """Bring files into canonical form."""
    from mechdsl.syntax.format.file import format_file
    from mechdsl.syntax.parse import parse, read_source

    import_module("mechdsl.vocab.corruptions")  # whose words the parser looks up
    paths, problems = mech_files(files)
    changed: list[Path] = []
    for path in paths:
        source, found = read_source(path)
        problems += found
        if source is None:
            continue
        tree, found = parse(source)
        problems += found
        if has_errors(found):
            continue
        text = format_file(tree)
        if text != source.text:
            changed.append(path)
            if not check:
                write_whole(path, text)
    print_diagnostics(problems)
    for path in changed:
        say(f"{'would change' if check else 'formatted'} {path}")
    return WRONG if has_errors(problems) or (check and changed) else FINE
