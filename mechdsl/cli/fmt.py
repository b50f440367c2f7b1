"""`mechdsl fmt`: bring files into canonical form."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import click

from mechdsl.base.files import write_whole
from mechdsl.cli.mech_files import STDIN, mech_files, read_file
from mechdsl.cli.options import files_argument
from mechdsl.cli.output import print_diagnostics, say
from mechdsl.cli.status import FINE, WRONG
from mechdsl.diagnostics.core import has_errors


@click.command()
@files_argument
@click.option("--check", is_flag=True, help="Change nothing; exit status 2 if it would.")
def fmt(files: tuple[Path, ...], check: bool) -> int:
    """Bring files into canonical form. `-` is standard input, whose form is printed."""
    from mechdsl.syntax.format.file import format_file
    from mechdsl.syntax.parse import parse

    import_module("mechdsl.vocab.corruptions")  # whose words the parser looks up
    paths, problems = mech_files(files)
    piped = STDIN in paths
    changed: list[str] = []
    for path in paths:
        source, found = read_file(path)
        problems += found
        if source is None:
            continue
        tree, found = parse(source)
        problems += found
        if has_errors(found):
            continue
        text = format_file(tree)
        if path == STDIN and not check:
            sys.stdout.write(text)
        elif text != source.text:
            changed.append(source.name)
            if not check:
                write_whole(path, text)
    print_diagnostics(problems)
    for name in changed:
        # What standard output holds is the text alone.
        say(f"{'would change' if check else 'formatted'} {name}", out=check or not piped)
    return WRONG if has_errors(problems) or (check and changed) else FINE
