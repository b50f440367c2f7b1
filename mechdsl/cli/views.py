"""`mechdsl explain`, `graph`, `plan` and `sites`: views of a file or a model, without a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from mechdsl.base.files import write_atomically
from mechdsl.base.text import dump_json
from mechdsl.cli.arguments import (
    CheckOptions,
    MechFile,
    PassOptions,
    allow_outside_option,
    allow_python_option,
    check_and_print,
    collect_check_options,
    file_argument,
    format_option,
    limit_option,
    load_plugins,
    pass_options,
    plugin_option,
    set_option,
    untrusted_option,
)
from mechdsl.cli.output import INVALID_INPUT, SUCCESS, make_console, print_diagnostics, print_json
from mechdsl.diagnostics.command_line import (
    LANGUAGE_PAGE,
    find_agent_page,
    find_page,
    is_page_name,
    language_words,
    page_codes,
)
from mechdsl.diagnostics.core import Diagnostic, has_errors


def complete_page_or_file(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Complete arguments of `mechdsl explain`; codes and words only after their first
    characters."""
    pages = [LANGUAGE_PAGE]
    if incomplete:
        pages += [*page_codes(), *(word for word in language_words() if word != LANGUAGE_PAGE)]
    begun = [CompletionItem(name) for name in pages if name.startswith(incomplete)]
    return [*begun, *MechFile().shell_complete(ctx, param, incomplete)]


@click.command(short_help="Show prompts token by token, or explain an error code or keyword.")
@click.argument("what", metavar="FILE|CODE|WORD|language", shell_complete=complete_page_or_file)
@set_option
@limit_option
@format_option("text", "json")
@click.option(
    "--for-agents",
    is_flag=True,
    help="With `language`: the whole language in at most 8,000 tokens, with ten examples.",
)
@allow_python_option
@allow_outside_option
@untrusted_option
@plugin_option
@collect_check_options
def explain(
    what: str,
    form: str,
    for_agents: bool,
    plugins: tuple[str, ...],
    checks: CheckOptions,
) -> int:
    """Show each prompt's tokens with the positions marked.

    Or print a page: `mechdsl explain E0301` describes an error and its fix, `mechdsl explain patch`
    lists what a word of the language means, and `mechdsl explain language` has every construct of
    the language. `-` is standard input.
    """
    if for_agents or is_page_name(what):
        return _print_page(*(find_agent_page if for_agents else find_page)(what))
    checked = check_and_print(Path(what), checks.settings(), plugins)
    if checked is None:
        return INVALID_INPUT
    from mechdsl.show import prompts as explaining

    if form == "json":
        print_json(dump_json(explaining.prompts_document(checked), indent=1))
    else:
        explaining.print_prompts(checked, make_console())
    return SUCCESS


def _print_page(text: str, problems: list[Diagnostic]) -> int:
    """Print a page, or the reasons why there is none."""
    print_diagnostics(problems)
    sys.stdout.write(text)
    return INVALID_INPUT if problems else SUCCESS


@click.command()
@file_argument
@set_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["dot", "mermaid", "svg", "text"]),
    default="mermaid",
    show_default=True,
)
@click.option("--to", type=click.Path(path_type=Path), help="Write the graph to this file.")
@click.option(
    "--before/--after",
    help="Show the graph before or after the planner's passes.  [default: after]",
)
@allow_python_option
@allow_outside_option
@untrusted_option
@plugin_option
@collect_check_options
def graph(
    file: Path,
    form: str,
    to: Path | None,
    before: bool,
    plugins: tuple[str, ...],
    checks: CheckOptions,
) -> int:
    """Draw the intervention graph of a file. `-` is standard input."""
    checked = check_and_print(file, checks.settings(), plugins)
    if checked is None:
        return INVALID_INPUT
    from mechdsl.show.graph import draw_graph

    text = draw_graph(checked.experiments, checked.saving, form, before=before)
    if to is None:
        sys.stdout.write(text)
    else:
        write_atomically(to, text)
    return SUCCESS


@click.command(short_help="Print the graph and the estimated cost.")
@file_argument
@set_option
@limit_option
@allow_python_option
@allow_outside_option
@untrusted_option
@plugin_option
@pass_options
@click.option(
    "--measure",
    is_flag=True,
    help="Run the base and source runs, and report detectable effects in the metric's units.",
)
@collect_check_options
def plan(
    file: Path,
    measure: bool,
    plugins: tuple[str, ...],
    checks: CheckOptions,
    passes: PassOptions,
) -> int:
    """Print the graph, cells, rows and passes of a file. `-` is standard input."""
    checked = check_and_print(file, checks.settings(), plugins)
    if checked is None:
        return INVALID_INPUT
    from mechdsl.pipeline.trained_files import list_training_costs
    from mechdsl.planner.passes import check_pass_names, make_plan
    from mechdsl.resolve.expansion import add_exact_cells
    from mechdsl.show.plan import print_plan

    wrong = check_pass_names(passes.without)
    print_diagnostics(wrong)
    if wrong:
        return INVALID_INPUT
    measured = None
    if measure:
        from mechdsl.execute.run_record import ExecutionOptions
        from mechdsl.loading.loader import import_library
        from mechdsl.pipeline.computation import measure_unpatched
        from mechdsl.pipeline.options import RunOptions

        import_library()
        sizes = ExecutionOptions(pass_tokens=passes.pass_tokens, prompt_tokens=passes.prompt_tokens)
        measured, problems = measure_unpatched(checked, RunOptions(execution=sizes))
        print_diagnostics(problems)
        if has_errors(problems):
            return INVALID_INPUT
    print_plan(
        make_plan(list(add_exact_cells(checked.experiments)), without=frozenset(passes.without)),
        make_console(),
        passes.pass_tokens,
        passes.prompt_tokens,
        measured,
        saving=checked.saving,
        trainings=list_training_costs(checked),
    )
    return SUCCESS


@click.command(short_help="Inspect a model: its sites, self-checks and planner passes.")
@click.argument("model", metavar="MODEL")
@format_option("text", "json")
@plugin_option
def sites(model: str, form: str, plugins: tuple[str, ...]) -> int:
    """Print a model's blocks and sites, the outcome of each check, and the planner passes that
    apply. MODEL is a name of the zoo, a folder, or `org/name` in the Hugging Face cache."""
    problems = load_plugins(plugins)
    if problems:
        print_diagnostics(problems)
        return INVALID_INPUT
    from mechdsl.loading.loader import import_library, inspect_model

    import_library()
    loaded_model, problems = inspect_model(model)
    if loaded_model is None:
        print_diagnostics(problems)
        return INVALID_INPUT
    from mechdsl.show import anatomy as anatomy_table

    if form == "json":
        print(json.dumps(anatomy_table.sites_document(loaded_model, problems), indent=1))
    else:
        anatomy_table.print_sites(loaded_model, problems, make_console())
    return SUCCESS
