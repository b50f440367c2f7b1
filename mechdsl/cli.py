"""The command line. Exit status: 0 fine, 1 an expectation failed, 2 something is wrong and no cell
was run, 3 the run broke off, 130 interrupted."""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e02_names import BadCommandLine, did_you_mean

if TYPE_CHECKING:
    from mechdsl.execute.execute import Options
    from mechdsl.program.python_files import Mode

FINE, FAILED, WRONG, BROKE_OFF, INTERRUPTED = 0, 1, 2, 3, 130


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Interpretability experiments as files: check, explain, plan and run them.",
    invoke_without_command=True,
)
@click.version_option(package_name="mechdsl", message="%(version)s")
@click.pass_context
def app(context: click.Context) -> None:
    """The commands; alone, the list of them."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


files_argument = click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
file_argument = click.argument("file", type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "parameters", multiple=True, metavar="K=V", help="Set a parameter: --set depth=12."
)
limit_option = click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most this many rows per experiment.",
)
allow_python_option = click.option(
    "--allow-python", is_flag=True, help="Run the Python files that the file refers to."
)
no_pass_option = click.option(
    "--no-pass",
    "no_pass",
    multiple=True,
    metavar="NAME",
    help="Switch a pass off; `plan` lists them.",
)
pass_tokens_option = click.option(
    "--pass-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most this many tokens in a pass over patched rows; else it is chosen.",
)
prompt_tokens_option = click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most this many tokens in a batch of unpatched prompts.",
)


def main() -> None:
    """The entry point: every way out is an exit status, and no user sees a traceback."""
    gc.disable()  # checking makes many objects and no garbage worth a tenth of its time
    atexit.register(gc.freeze)  # nor is it worth looking for at the end
    # Pydantic would read the metadata of every installed package to look for plugins of its own.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    # Torch's threads spin while they wait for each other: with a core taken by other work that took
    # thirty times as long. Sleeping instead costs nothing to speak of.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        # Not `app(…)`: click would end broken pipes as if an expectation had failed.
        with app.make_context("mechdsl", sys.argv[1:]) as context:
            status = app.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        status = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except click.ClickException as error:
        _print([_usage(error)])
        status = WRONG
    except BrokenPipeError:
        # The reader (`head`) has seen enough; nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = FINE
    except Exception as error:
        status = _broke_off("mechdsl", error)
        if isinstance(error, OSError):
            status = WRONG
    sys.exit(status if isinstance(status, int) else FINE)


class _BadSetting(click.UsageError):
    """`--set` without a name or a value."""

    hint = "write `--set NAME=VALUE`, for example `--set depth=12`"


def _usage(error: click.ClickException) -> Diagnostic:
    """A mistake on the command line as a diagnostic."""
    context: click.Context | None = getattr(error, "ctx", None)
    if context is None or context.parent is None:
        hint = "`mechdsl --help` lists the commands"
    else:
        hint = f"`mechdsl {context.info_name} --help` lists what it takes"
    if isinstance(error, click.NoSuchOption) and context is not None:
        options = [o for p in context.command.params for o in p.opts if o.startswith("--")]
        hint = did_you_mean(error.option_name, options, hint)
    elif isinstance(error, click.UsageError) and "No such command" in error.message:
        word = error.message.split("'")[1]
        hint = did_you_mean(word, app.list_commands(click.Context(app)), hint)
    elif isinstance(error, _BadSetting):
        hint = error.hint
    reason = error.format_message().partition(" Did you mean")[0].rstrip(".")
    return BadCommandLine(reason=reason[0].lower() + reason[1:], hint=hint)


def _broke_off(what: str, error: Exception) -> int:
    """The last resort, so that no user meets a traceback."""
    from mechdsl.program.python_files import PythonFailure

    if isinstance(error, PythonFailure):
        _print([error.diagnostic])
        return BROKE_OFF
    if isinstance(error, OSError) and error.filename is not None:
        reason = f"cannot write `{error.filename}`: {(error.strerror or str(error)).lower()}"
        hint = "name a file in a folder that exists and may be written to"
        _print([BadCommandLine(reason=reason, hint=hint)])
        return BROKE_OFF
    if os.environ.get("MECHDSL_DEBUG"):
        raise error
    print(
        f"{what} broke off: {type(error).__name__}: {error}\nset MECHDSL_DEBUG=1 for the traceback",
        file=sys.stderr,
    )
    return BROKE_OFF


# --- output ---


def _print(diagnostics: list[Diagnostic], form: str = "full", *, out: bool = False) -> None:
    """Diagnostics on standard error, or on standard output where they are what was asked for."""
    from mechdsl.diagnostics import render

    stream = sys.stdout if out else sys.stderr
    if form == "full":
        if not diagnostics:
            return
        colour = stream.isatty() and "NO_COLOR" not in os.environ
        text = render.render_full(
            diagnostics, color=colour, width=_width(), ascii=render.needs_ascii(stream)
        )
    else:
        text = {
            "json": render.render_json,
            "github": render.render_github,
            "sarif": render.render_sarif,
        }[form](diagnostics)
    stream.write(text if text.endswith("\n") or not text else text + "\n")


def _width() -> int:
    import shutil

    return max(40, shutil.get_terminal_size((100, 24)).columns)


def _console(*, stderr: bool = False) -> Any:
    """A rich console: colours only on terminals, and as wide as the reader's window."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # to `main`; rich would exit as if an expectation had failed

    return Piped(stderr=stderr, width=None if sys.stdout.isatty() else _width(), soft_wrap=False)


def _settings(
    parameters: tuple[str, ...],
    limit: int | None = None,
    only: str | None = None,
    python: Mode = "refuse",
) -> Any:
    from mechdsl.validate.file import Settings

    given: dict[str, str] = {}
    for text in parameters:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise _BadSetting(f"`--set {text}` has no {'name' if equals else '`=`'}")
        if name in given:
            raise _BadSetting(f"`--set {name}=…` is given twice")
        given[name] = value.strip()
    return Settings(given, limit, only, python)


def _mode(allow_python: bool) -> Mode:
    return "run" if allow_python else "refuse"


def _mech_files(paths: tuple[Path, ...]) -> tuple[list[Path], list[Diagnostic]]:
    """Files as given; folders are walked, in order of their names."""
    found: list[Path] = []
    problems: list[Diagnostic] = []
    for path in paths:
        if os.path.isdir(path):  # which, unlike `Path.is_dir`, takes any name
            inside = sorted(path.rglob("*.mech"))
            if not inside:
                problems.append(
                    BadCommandLine(
                        reason=f"there is no `.mech` file in `{path}`",
                        hint="name a file, or a folder that has some",
                    )
                )
            found.extend(inside)
        else:
            found.append(path)
    return list(dict.fromkeys(found)), problems


def _checked(file: Path, settings: Any) -> tuple[Any, list[Diagnostic]]:
    """One file checked; None where it can't be read."""
    from mechdsl.syntax.parse import read_source
    from mechdsl.validate.file import check_source

    source, problems = read_source(file)
    if source is None:
        return None, problems
    checked = check_source(source, settings)
    return checked, checked.diagnostics


# --- commands ---


@app.command()
@files_argument
@set_option
@limit_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    help="Instead of what the file says.",
)
@click.option(
    "--offload",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Spread the model over devices, memory and this folder, with accelerate.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Keep every prompt's values here.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
)
@click.option("--only", metavar="EXPERIMENT", help="Run this experiment, and what it needs.")
@click.option("--profile", is_flag=True, help="Afterwards, estimated against measured work.")
@allow_python_option
@no_pass_option
@pass_tokens_option
@prompt_tokens_option
def run(
    files: tuple[Path, ...],
    parameters: tuple[str, ...],
    limit: int | None,
    device: str,
    dtype: str | None,
    offload: Path | None,
    out: Path | None,
    form: str,
    only: str | None,
    profile: bool,
    allow_python: bool,
    no_pass: tuple[str, ...],
    pass_tokens: int | None,
    prompt_tokens: int | None,
) -> int:
    """Run files and print their tables. Exit status 0 when every expectation holds."""
    settings = _settings(parameters, limit, only, _mode(allow_python))
    paths, problems = _mech_files(files)
    # All files are checked before the first one runs (and before torch is imported).
    everything: list[Any] = []
    for path in paths:
        checked, found = _checked(path, settings)
        problems += found
        everything.append(checked)
    _print(problems)
    if has_errors(problems):
        return WRONG
    from mechdsl.execute.execute import Options

    sizes = Options(pass_tokens=pass_tokens, prompt_tokens=prompt_tokens)
    return _run(everything, device, dtype, offload, out, form, profile, frozenset(no_pass), sizes)


def _run(
    files: list[Any],
    device: str,
    dtype: str | None,
    offload: Path | None,
    out: Path | None,
    form: str,
    profile: bool,
    without: frozenset[str],
    execution: Options,
) -> int:
    from mechdsl.loading.load import import_library
    from mechdsl.pipeline import RunOptions, run_checked
    from mechdsl.results.collect import versions
    from mechdsl.results.experiment import Results
    from mechdsl.show.progress import Bar

    import_library()
    gc.freeze()  # what was imported is no garbage,
    gc.enable()  # but models and results do make some
    found: list[Any] = []
    profiles: list[Any] = []

    def keep(plan: Any, done: Any) -> None:
        profiles.append((plan, done))

    for checked in files:
        source = checked.source
        bar = Bar(source.name)
        options = RunOptions(
            device=device,
            dtype=dtype,
            offload=offload,
            out=out,
            without=without,
            execution=replace(execution, on_progress=bar.advance),
            on_profile=keep if profile else None,
        )
        try:
            with bar:
                result, diagnostics = run_checked(checked, options)
        except KeyboardInterrupt:
            kept = f"; what is finished is in {out}" if out is not None else ""
            print(f"interrupted{kept}", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            return _broke_off(f"the run of {source.name}", error)
        _print(diagnostics)
        if result is None:
            return WRONG
        found.append(result)
        if not result.experiments:
            print(f"{source.name} has no experiments: nothing was run", file=sys.stderr)
        try:
            _show(result, source.folder, tables=form == "table")
        except BrokenPipeError:
            raise
        except Exception as error:
            return _broke_off(f"a report of {source.name}", error)
        if profile and result.sizes is not None:
            from mechdsl.show.plan import print_profile

            for plan, done in profiles:  # several where experiments wait for others' results
                print_profile(plan, done, result.sizes, _console(stderr=form != "table"))
            profiles.clear()
    results = Results(tuple(found), versions())
    if form == "json":
        sys.stdout.write(results.to_json() + "\n")
    elif form == "csv":
        from mechdsl.show.reports.files import results_csv

        sys.stdout.write(results_csv(results))
    return FINE if results.holds else FAILED


def _show(result: Any, folder: Path, *, tables: bool) -> None:
    """All reports of a file, each experiment with the verdicts on its expectations.

    tables: print them; else only those are made that go to a file.
    """
    from mechdsl.show.reports.verdicts import print_verdicts
    from mechdsl.vocab.reports import show

    console = _console()
    for experiment in result.experiments:
        for report in experiment.reports:
            if not tables and report.file is None:
                continue
            written = show(experiment, report, console, folder)
            if written is not None:
                said = f"{experiment.name}: report {report.kind} written to {written}"
                print(said, file=sys.stdout if tables else sys.stderr)
        if tables:
            print_verdicts(experiment, console)


@app.command()
@files_argument
@set_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["full", "json", "github", "sarif"]),
    default="full",
    show_default=True,
)
def validate(files: tuple[Path, ...], parameters: tuple[str, ...], form: str) -> int:
    """Check files without weights, as in CI. Exit status 2 where one has an error."""
    settings = _settings(parameters, python="look")
    paths, problems = _mech_files(files)
    unchecked: list[str] = []
    unrun: list[str] = []
    for path in paths:
        checked, found = _checked(path, settings)
        problems += found
        if checked is not None:
            unchecked += [f"{path}: {name}" for name in checked.unchecked]
            unrun += [f"{path}: {name}" for name in checked.unrun]
    _print(problems, form, out=form != "full")
    if form == "full" and not has_errors(problems):
        count = f"{len(paths)} file" + ("s" if len(paths) != 1 else "")
        rest = f", {len(unchecked)} experiments without their model" if unchecked else ""
        rest += f", {len(unrun)} experiments without their Python" if unrun else ""
        print(f"{count} checked: no errors{rest}")
    return WRONG if has_errors(problems) else FINE


@app.command(short_help="Print the graph, and how much there is to run.")
@file_argument
@set_option
@limit_option
@allow_python_option
@no_pass_option
@pass_tokens_option
@prompt_tokens_option
def plan(
    file: Path,
    parameters: tuple[str, ...],
    limit: int | None,
    allow_python: bool,
    no_pass: tuple[str, ...],
    pass_tokens: int | None,
    prompt_tokens: int | None,
) -> int:
    """Print the intervention graph, the cells, rows and forward passes of a file."""
    checked, problems = _checked(file, _settings(parameters, limit, python=_mode(allow_python)))
    _print(problems)
    if checked is None or has_errors(problems):
        return WRONG
    from mechdsl.plan.make_plan import make_plan
    from mechdsl.plan.passes import unknown_passes
    from mechdsl.plan.plan import PASS_TOKENS, PROMPT_TOKENS
    from mechdsl.show.plan import print_plan

    wrong = unknown_passes(no_pass)
    _print(wrong)
    if wrong:
        return WRONG
    print_plan(
        make_plan(checked.experiments, without=frozenset(no_pass)),
        _console(),
        pass_tokens or PASS_TOKENS,
        prompt_tokens or PROMPT_TOKENS,
    )
    return FINE


@app.command()
@file_argument
@set_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["dot", "mermaid", "svg", "text"]),
    default="mermaid",
    show_default=True,
)
@click.option("--to", type=click.Path(path_type=Path), help="Write it to this file.")
@click.option(
    "--before/--after", help="Before the planner's passes, or as it is run.  [default: after]"
)
@allow_python_option
def graph(
    file: Path,
    parameters: tuple[str, ...],
    form: str,
    to: Path | None,
    before: bool,
    allow_python: bool,
) -> int:
    """Draw the intervention graph."""
    checked, problems = _checked(file, _settings(parameters, python=_mode(allow_python)))
    _print(problems)
    if checked is None or has_errors(problems):
        return WRONG
    from mechdsl.plan.make_plan import graph_of_file, rewrite
    from mechdsl.show import graph as draw

    made = graph_of_file(checked.experiments)
    if not before:
        made, _ = rewrite(made)
    drawings = {
        "dot": draw.to_dot,
        "mermaid": draw.to_mermaid,
        "svg": draw.to_svg,
        "text": draw.to_text,
    }
    text = drawings[form](made)
    if to is None:
        sys.stdout.write(text)
    else:
        to.write_text(text, encoding="utf-8")
    return FINE


@app.command(short_help="Show prompts token by token, or an error's page.")
@click.argument("what", metavar="FILE|CODE")
@set_option
@limit_option
@click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@allow_python_option
def explain(
    what: str, parameters: tuple[str, ...], limit: int | None, form: str, allow_python: bool
) -> int:
    """Show each prompt's tokens with the positions marked; or explain an error's code."""
    from mechdsl.diagnostics.pages import page

    if what[:1] in "EWew" and what[1:].isdigit():
        what = what.upper()
        text = page(what)
        if text is None:
            from mechdsl.diagnostics.pages import codes

            hint = did_you_mean(what, codes(), "codes look like E0305")
            _print([BadCommandLine(reason=f"there is no code `{what}`", hint=hint)])
            return WRONG
        sys.stdout.write(text)
        return FINE
    checked, problems = _checked(
        Path(what), _settings(parameters, limit, python=_mode(allow_python))
    )
    _print(problems)
    if checked is None or has_errors(problems):
        return WRONG
    from mechdsl.show import prompts as explaining

    if form == "json":
        json.dump(explaining.as_json(checked), sys.stdout, ensure_ascii=False, indent=1)
        sys.stdout.write("\n")
    else:
        explaining.explain(checked, _console())
    return FINE


@app.command()
@files_argument
@click.option("--check", is_flag=True, help="Change nothing; exit status 2 if it would.")
def fmt(files: tuple[Path, ...], check: bool) -> int:
    """Bring files into canonical form."""
    from mechdsl.syntax.format.file import format_file
    from mechdsl.syntax.parse import parse, read_source

    import_module("mechdsl.vocab.corruptions")  # whose words the parser looks up
    paths, problems = _mech_files(files)
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
                path.write_text(text, encoding="utf-8")
    _print(problems)
    for path in changed:
        print(f"{'would change' if check else 'formatted'} {path}")
    return WRONG if has_errors(problems) or (check and changed) else FINE


@app.command(short_help="Take a model apart: its sites, the checks, the passes that apply.")
@click.argument("model", metavar="MODEL")
@click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True
)
def sites(model: str, form: str) -> int:
    """Print a model's blocks and sites, the outcome of each check, and the planner passes that
    apply. MODEL is a name of the zoo, a folder, or `org/name` in the Hugging Face cache."""
    from mechdsl.loading.load import import_library, look

    import_library()
    found, problems = look(model)
    if found is None:
        _print(problems)
        return WRONG
    from mechdsl.show import anatomy as anatomy_table

    if form == "json":
        print(json.dumps(anatomy_table.as_json(found, problems), indent=1))
    else:
        anatomy_table.print_sites(found, problems, _console())
    return FINE


@app.command(short_help="Print a JSON schema.")
@click.argument("what", type=click.Choice(["results", "experiment"]), default="results")
def schema(what: str) -> int:
    """Print a JSON schema: of the document that `run --format json` prints, or of an experiment."""
    from mechdsl.program import spec
    from mechdsl.results.document import results_schema

    found = results_schema() if what == "results" else spec.Program.model_json_schema()
    print(json.dumps(found, indent=2))
    return FINE


@app.command()
def version() -> int:
    """Print the version."""
    from mechdsl import __version__

    print(__version__)
    return FINE


if __name__ == "__main__":
    main()
