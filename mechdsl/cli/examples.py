"""`mechdsl examples`: the examples that come with the package."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from mechdsl.base.files import write_whole
from mechdsl.base.plural import plural
from mechdsl.base.shipped import shipped_path
from mechdsl.cli.output import say
from mechdsl.cli.status import FINE

DEFAULT = Path("mechdsl-examples")
_ENDS = (".mech", ".jsonl")
"""Of files and their data; a run may have left other things beside them."""
_COMMENT = re.compile(r"^#[^\n]*(?:\n# [^\n]*)*", re.M)
_SENTENCE = re.compile(r".*?[.?](?=\s|$)")


@click.command(short_help="Copy the examples that come with mechdsl into a folder.")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--list", "listed", is_flag=True, help="Copy nothing; say what there is.")
def examples(folder: Path | None, listed: bool) -> int:
    """Copy the examples that come with mechdsl into FOLDER, by default `mechdsl-examples`.

    A file that is already there is left as it is.
    """
    origin = shipped_path("examples", "examples")
    if listed:
        if folder is not None:
            raise click.UsageError("`--list` copies nothing, so it takes no folder")
        return _list(origin)
    return _copy(origin, DEFAULT if folder is None else folder)


def _list(origin: Path) -> int:
    """Each example with the first sentence of its comment."""
    found = sorted(origin.glob("*.mech"))
    width = max(len(path.name) for path in found)
    for path in found:
        say(f"{path.name:{width}}  {_about(path.read_text(encoding='utf-8'))}")
    return FINE


def _about(text: str) -> str:
    comment = _COMMENT.search(text)
    words = "" if comment is None else " ".join(comment[0].replace("#", "").split())
    sentence = _SENTENCE.match(words)
    return words if sentence is None else sentence[0]


def _copy(origin: Path, folder: Path) -> int:
    """Copy what isn't there, with the data that the files read."""
    there: list[Path] = []
    copied = 0
    for path in sorted(each for end in _ENDS for each in origin.rglob(f"*{end}")):
        target = folder / path.relative_to(origin)
        if os.path.lexists(target):
            there.append(target)
        else:
            write_whole(target, path.read_text(encoding="utf-8"))
            copied += 1
    for target in there:
        say(f"{target} is there already, and was left as it is", out=False)
    say(f"copied {plural(copied, 'file')} to {folder}")
    return FINE
