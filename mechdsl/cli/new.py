"""`mechdsl new`: writes a first experiment from five answers."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from mechdsl.base.files import write_atomically
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.cli.output import INVALID_INPUT, SUCCESS, print_diagnostics, print_line
from mechdsl.diagnostics.core import has_errors


@dataclass(frozen=True)
class Task:
    """Prompts with a corruption, and a model of the zoo that solves them."""

    model: str
    prompts: str
    corruption: str
    key_position: str
    """The position that the corruption changes."""


TASKS = {
    "counting": Task(
        "counting",
        """\
  count in 3..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
  corrupt other { count = count - 1 }
""",
        "other",
        "last-item token",
    ),
    "names": Task(
        "names",
        """\
  io in ["Mary", "John", "Tom", "Anna", "Luke"]
  s = other(io)
  place in ["shop", "park", "school"]
  template "When {io} and {s1 = s} went to the {place}, {s2 = s} gave a bag to"
  answer " {io}"
  corrupt other { io, s1, s2 = others(io, s) }
""",
        "other",
        "s2 token",
    ),
}
"""Answers to the question about the task."""

SITES = {
    "residual": "resid_post layer *",
    "attention": "attn_out layer *",
    "mlp": "mlp_out layer *",
    "heads": "layer * head *",
}
"""Answers to the question about what to patch."""

POSITIONS = ("last", "changed")
"""Answers to the question about where to patch."""

MEASURES = {
    "recovery": "logit(answer) - logit(answer of {corruption}) as recovery",
    "logit": "logit(answer) as delta",
    "probability": "prob(answer) as delta",
}
"""Answers to the question about what to measure."""


def experiment_text(task: Task, model: str, site: str, position: str, measure: str) -> str:
    """Return a file that patches from the original prompts into the corrupted ones.

    Args:
        task: The prompts.
        model: An expression such as `zoo("counting")`.
        site: A key of `SITES`.
        position: One of `POSITIONS`.
        measure: A key of `MEASURES`.
    """
    place = task.key_position if position == "changed" else "last token"
    return f"""\
mech 1

model subject = {model}

prompts texts {{
{task.prompts}}}

experiment first {{
  model subject
  prompts texts limit 32
  from clean into {task.corruption}
  patch {SITES[site]} at {place}
  measure {MEASURES[measure].format(corruption=task.corruption)}
  report table
}}
"""


def model_expression(answer: str) -> str:
    """Return the expression of a model: `zoo:NAME`, `hf:ORG/NAME` or `local:FOLDER`.

    Raises:
        click.BadParameter: If the answer has another form.
    """
    origin, _, name = answer.partition(":")
    if origin not in ("zoo", "hf", "local") or not name or set(name) & set('"\\\n{}'):
        fix = "write `zoo:NAME`, `hf:ORG/NAME` or `local:FOLDER`"
        if re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", answer):
            known = [task.model for task in TASKS.values()]
            fix = f"did you mean `{'zoo' if answer in known else 'hf'}:{answer}`?"
        raise click.BadParameter(f"`{answer}` is not a model; {fix}")
    return f'{origin}("{name}")'


def mech_path(file: Path) -> Path:
    """Return the path with the extension `.mech`, which is added if there is none.

    Raises:
        click.BadParameter: If the path has another extension.
    """
    if file.suffix == ".mech":
        return file
    if file.suffix:
        raise click.BadParameter(f"`{file}` has another extension; write `{file.stem}.mech`")
    return file.with_name(f"{file.name}.mech") if file.name else file


def is_terminal() -> bool:
    """Whether standard input is a terminal, so that questions can be answered."""
    return sys.stdin is not None and sys.stdin.isatty()


def _ask(question: str, answer: str | None, choices: list[str], interactive: bool) -> str:
    """Return the answer of an option, of the user, or the first choice."""
    if answer is not None or not interactive:
        return choices[0] if answer is None else answer
    return click.prompt(question, default=choices[0], type=click.Choice(choices))


@click.command(short_help="Write a first experiment from five questions.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--task", type=click.Choice(list(TASKS)), help="The prompts.")
@click.option("--model", help="Model to study: zoo:NAME, hf:ORG/NAME or local:FOLDER.")
@click.option("--patch", type=click.Choice(list(SITES)), help="Site to patch.")
@click.option("--at", type=click.Choice(POSITIONS), help="Position to patch.")
@click.option("--measure", type=click.Choice(list(MEASURES)), help="Metric to measure.")
def new(
    file: Path,
    task: str | None,
    model: str | None,
    patch: str | None,
    at: str | None,
    measure: str | None,
) -> int:
    """Write a first experiment to FILE.

    Without options, the command asks five questions. With an option, or if standard input is not
    a terminal, it asks nothing and uses defaults for the rest. It checks the file first and
    never overwrites one. The extension `.mech` is added if it is missing.
    """
    file = mech_path(file)
    if os.path.lexists(file):
        raise click.UsageError(f"`{file}` already exists; choose another name")
    interactive = is_terminal() and not any((task, model, patch, at, measure))
    chosen = TASKS[_ask("Task", task, list(TASKS), interactive)]
    default = f"zoo:{chosen.model}"
    if interactive:
        expression = click.prompt("Model", default=default, value_proc=model_expression)
    else:
        expression = model_expression(default if model is None else model)
    site = _ask("What to patch", patch, list(SITES), interactive)
    position = _ask("Where to patch", at, list(POSITIONS), interactive)
    measured = _ask("What to measure", measure, list(MEASURES), interactive)
    text = experiment_text(chosen, expression, site, position, measured)
    problems = check_source(Source(text, file)).diagnostics
    print_diagnostics(problems)
    if has_errors(problems):
        print_line(f"`{file}` was not written, because it would not run", out=False)
        return INVALID_INPUT
    write_atomically(file, text)
    print_line(f"wrote {file}; run it with `mechdsl run {shlex.quote(str(file))}`")
    return SUCCESS
