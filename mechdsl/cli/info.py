"""`mechdsl completion`, `examples`, `schema` and `version`: commands that take no file."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import click
from click.shell_completion import (
    BashComplete,
    add_completion_class,
    get_completion_class,
    shell_complete,
)

from mechdsl.base.files import shipped_path, write_atomically
from mechdsl.base.text import count_noun
from mechdsl.cli.output import COMPLETION_VARIABLE, SUCCESS, print_line


class QuotingBash(BashComplete):
    """Bash completion that also quotes file names and offers folders."""

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' response completion type value
    response=$(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD \\
        %(complete_var)s=bash_complete $1)
    COMPREPLY=()
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            plain) COMPREPLY+=("$value") ;;
            dir) compopt -o filenames -o plusdirs ;;
            file) compopt -o default ;;
        esac
    done
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


add_completion_class(QuotingBash)


def complete(app: click.Command, asked: str) -> int:
    """Answer a shell's completion request; return the exit status."""
    return shell_complete(app, {}, "mechdsl", COMPLETION_VARIABLE, asked)


@click.command(short_help="Print the shell script for command completion.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> int:
    """Print a script that lets the Tab key complete commands, options and files.

    \b
    For bash, put this line at the end of ~/.bashrc:
        eval "$(mechdsl completion bash)"
    For zsh, this one at the end of ~/.zshrc:
        eval "$(mechdsl completion zsh)"
    For fish, this one in ~/.config/fish/config.fish:
        mechdsl completion fish | source
    """
    made = get_completion_class(shell)
    assert made is not None
    sys.stdout.write(made(context.find_root().command, {}, "mechdsl", COMPLETION_VARIABLE).source())
    return SUCCESS


DEFAULT_FOLDER = Path("mechdsl-examples")

_ENDS = (".mech", ".jsonl")
"""Extensions of files and their data; a run may have left other files next to them."""

_COMMENT = re.compile(r"^#[^\n]*(?:\n# [^\n]*)*", re.M)

_SENTENCE = re.compile(r".*?[.?](?=\s|$)")


@click.command(short_help="Copy the examples that come with mechdsl into a folder.")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--list", "listed", is_flag=True, help="List the examples without copying them.")
def examples(folder: Path | None, listed: bool) -> int:
    """Copy the examples that come with mechdsl into FOLDER, by default `mechdsl-examples`.

    A file that is already there is left as it is.
    """
    origin = shipped_path("examples", "examples")
    if listed:
        if folder is not None:
            raise click.UsageError("`--list` copies nothing and takes no folder")
        return _list(origin)
    return _copy(origin, DEFAULT_FOLDER if folder is None else folder)


def _list(origin: Path) -> int:
    """Print each example with the first sentence of its comment."""
    paths = sorted(origin.glob("*.mech"))
    width = max(len(path.name) for path in paths)
    for path in paths:
        print_line(f"{path.name:{width}}  {_about(path.read_text(encoding='utf-8'))}")
    return SUCCESS


def _about(text: str) -> str:
    comment = _COMMENT.search(text)
    words = "" if comment is None else " ".join(comment[0].replace("#", "").split())
    sentence = _SENTENCE.match(words)
    return words if sentence is None else sentence[0]


def _copy(origin: Path, folder: Path) -> int:
    """Copy missing files and the data that they read."""
    there: list[Path] = []
    copied = 0
    for path in sorted(each for end in _ENDS for each in origin.rglob(f"*{end}")):
        target = folder / path.relative_to(origin)
        if os.path.lexists(target):
            there.append(target)
        else:
            write_atomically(target, path.read_text(encoding="utf-8"))
            copied += 1
    for target in there:
        print_line(f"{target} already exists and was left unchanged", out=False)
    print_line(f"copied {count_noun(copied, 'file')} to {folder}")
    return SUCCESS


@click.command(short_help="Print a JSON schema.")
@click.argument(
    "what", type=click.Choice(["results", "differences", "experiment"]), default="results"
)
def schema(what: str) -> int:
    """Print a JSON schema: of what `run` or `diff` prints as JSON, or of an experiment."""
    if what == "results":
        from mechdsl.results.document import results_schema

        found = results_schema()
    elif what == "differences":
        from mechdsl.results.differences.comparison import differences_schema

        found = differences_schema()
    else:
        from mechdsl.program import spec

        found = spec.program_schema()
    print(json.dumps(found, indent=2))
    return SUCCESS


@click.command()
def version() -> int:
    """Print the version."""
    from mechdsl.base.version import __version__

    print(__version__)
    return SUCCESS
