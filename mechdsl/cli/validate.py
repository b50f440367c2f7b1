"""`mechdsl validate` and `mechdsl fmt`: check files without weights, and format them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from mechdsl.base import limits
from mechdsl.base.files import write_atomically
from mechdsl.base.text import count_noun
from mechdsl.cli.arguments import (
    STDIN,
    CheckOptions,
    allow_outside_option,
    check_mech_file,
    collect_check_options,
    files_argument,
    find_mech_files,
    format_option,
    load_plugins,
    map_files,
    plugin_option,
    read_mech_file,
    set_option,
    untrusted_option,
)
from mechdsl.cli.output import INVALID_INPUT, SUCCESS, print_diagnostics, print_line
from mechdsl.diagnostics.core import Diagnostic, has_errors

if TYPE_CHECKING:
    from mechdsl.checks.file_check import CheckSettings
    from mechdsl.syntax.tree_builder import RegisteredWords


@click.command()
@files_argument
@set_option
@allow_outside_option
@untrusted_option
@format_option("full", "json", "github", "sarif")
@click.option(
    "--require-models",
    is_flag=True,
    help="Report models that are missing or have no weights as errors.",
)
@plugin_option
@collect_check_options
def validate(
    files: tuple[Path, ...],
    form: str,
    require_models: bool,
    plugins: tuple[str, ...],
    checks: CheckOptions,
) -> int:
    """Check files without loading weights. Exit status 2 where one has an error.

    `-` is standard input.
    """
    problems = load_plugins(plugins)
    if problems:
        print_diagnostics(problems, form, out=form != "full")
        return INVALID_INPUT
    how = replace(
        checks.settings(),
        python="look",
        require_models=require_models,
        prompts_enough=limits.CHECKED_PROMPTS,
    )
    paths, problems = find_mech_files(files)
    unchecked: list[str] = []
    unrun: list[str] = []
    hollow: list[Diagnostic] = []
    for path, one in zip(paths, map_files(_validated, paths, how), strict=True):
        problems += one.problems
        unchecked += [f"{path}: {name}" for name in one.unchecked]
        unrun += [f"{path}: {name}" for name in one.unrun]
        hollow += one.hollow
    problems += hollow if require_models else []
    print_diagnostics(problems, form, out=form != "full")
    if form == "full" and not has_errors(problems):
        count = f"{len(paths)} file" + ("s" if len(paths) != 1 else "")
        rest = _without(unchecked, "model") + _without(unrun, "Python")
        if hollow:
            rest += f", {count_noun(len(hollow), 'model')} without weights on this machine"
        print(f"{count} checked: no errors{rest}")
    return INVALID_INPUT if has_errors(problems) else SUCCESS


class _Validated(NamedTuple):
    """The diagnostics of one file."""

    problems: Sequence[Diagnostic]
    unchecked: Sequence[str] = ()
    """Experiments without their model."""
    unrun: Sequence[str] = ()
    """Experiments without their Python functions."""
    hollow: Sequence[Diagnostic] = ()
    """E0406 for models without weights."""


def _validated(path: Path, how: CheckSettings) -> _Validated:
    from mechdsl.models.folder import report_missing_weights

    checked, problems = check_mech_file(path, how)
    if checked is None:
        return _Validated(problems)
    hollow = report_missing_weights(checked.program.models.values())
    return _Validated(problems, checked.unchecked, checked.unrun, hollow)


def _without(experiments: list[str], what: str) -> str:
    """Return how many experiments were checked except for what depends on this."""
    if not experiments:
        return ""
    many = len(experiments) > 1
    whose = f"{len(experiments)} experiments without their" if many else "1 experiment without its"
    return f", {whose} {what}"


@click.command()
@files_argument
@click.option(
    "--check", is_flag=True, help="Change nothing; exit with status 2 if a file would change."
)
@plugin_option
def fmt(files: tuple[Path, ...], check: bool, plugins: tuple[str, ...]) -> int:
    """Format files. `-` is standard input, whose form is printed."""
    problems = load_plugins(plugins)
    if problems:
        print_diagnostics(problems)
        return INVALID_INPUT
    from mechdsl.syntax.formatter import format_file
    from mechdsl.syntax.frontend import parse

    words = _registered_words(plugins)
    paths, problems = find_mech_files(files)
    piped = STDIN in paths
    changed: list[str] = []
    for path in paths:
        source, diagnostics = read_mech_file(path)
        problems += diagnostics
        if source is None:
            continue
        tree, diagnostics = parse(source, words)
        problems += diagnostics
        if has_errors(diagnostics):
            continue
        text = format_file(tree, words)
        if path == STDIN and not check:
            sys.stdout.write(text)
        elif text != source.text:
            changed.append(source.name)
            if not check:
                write_atomically(path, text)
    print_diagnostics(problems)
    for name in changed:
        # Standard output contains only the text.
        print_line(f"{'would change' if check else 'formatted'} {name}", out=check or not piped)
    return INVALID_INPUT if has_errors(problems) or (check and changed) else SUCCESS


def _registered_words(plugins: Sequence[str]) -> RegisteredWords:
    """Return the words that changes add to the language, and those of all entries of plugins."""
    if plugins:
        from mechdsl.rules.kinds import registered_words

        return registered_words()
    from mechdsl.syntax.tree_builder import RegisteredWords
    from mechdsl.vocab.corruptions import change_signatures

    return RegisteredWords(changes=change_signatures())  # all other words are in the grammar
