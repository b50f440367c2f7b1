"""`mechdsl completion`: what makes the Tab key complete commands, options and files in a shell."""

from __future__ import annotations

import sys

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    shell_complete,
)

from mechdsl.cli.options import MechFile
from mechdsl.cli.status import COMPLETE, FINE
from mechdsl.diagnostics.pages import LANGUAGE, codes


class QuotingBash(BashComplete):
    """As click's, but names of files are quoted, and folders are offered beside them."""

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


def complete_page_or_file(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """What `mechdsl explain` takes; codes only where one is begun."""
    pages = [LANGUAGE, *(codes() if incomplete else [])]
    begun = [CompletionItem(name) for name in pages if name.startswith(incomplete)]
    return [*begun, *MechFile().shell_complete(ctx, param, incomplete)]


def complete(app: click.Command, asked: str) -> int:
    """Answer a shell; the exit status."""
    return shell_complete(app, {}, "mechdsl", COMPLETE, asked)


@click.command(short_help="Print what makes the Tab key complete commands in a shell.")
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
    sys.stdout.write(made(context.find_root().command, {}, "mechdsl", COMPLETE).source())
    return FINE
