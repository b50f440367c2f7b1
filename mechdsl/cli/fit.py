"""`mechdsl fit` trains what files declare with `fit(…)`; `mechdsl export` writes their models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mechdsl.base.runtime import read_launch
from mechdsl.cli.arguments import (
    CheckOptions,
    StoreOptions,
    allow_python_option,
    check_and_print,
    check_mech_file,
    collect_check_options,
    device_option,
    dtype_option,
    files_argument,
    find_mech_files,
    format_option,
    load_plugins,
    plugin_option,
    set_option,
    store_options,
    untrusted_option,
)
from mechdsl.cli.output import (
    INCOMPLETE,
    INVALID_INPUT,
    SUCCESS,
    make_console,
    print_diagnostics,
    print_json,
    print_line,
    report_failure,
    report_interruption,
    silence,
)
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.rendering import diagnostic_facts

if TYPE_CHECKING:
    from mechdsl.checks.file_check import CheckedFile
    from mechdsl.execute.run_record import TrainedFit
    from mechdsl.pipeline.options import RunOptions

CONTINUES = "; the same command continues the training"


@click.command()
@files_argument
@set_option
@device_option
@dtype_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Also copy each dictionary into a new folder below this one, with a model card.",
)
@format_option("table", "json")
@allow_python_option
@untrusted_option
@plugin_option
@store_options
@collect_check_options
def fit(
    files: tuple[Path, ...],
    device: str,
    dtype: str | None,
    out: Path | None,
    form: str,
    plugins: tuple[str, ...],
    checks: CheckOptions,
    stores: StoreOptions,
) -> int:
    """Train what files declare with `fit(…)`.

    Trained dictionaries are stored. What is stored isn't trained again, except with `--fresh`. An
    interrupted training continues where it was. Exit status: 0 if everything is trained, 2 for an
    invalid file, 3 if a training or a copy failed. A training whose loss rose has failed.

    Under `accelerate launch` or `torchrun`, all processes train together.
    """
    from mechdsl.pipeline.options import RunOptions

    how = checks.settings()
    options = RunOptions(settings=how, device=device, dtype=dtype, fresh=stores.fresh)
    number, count = read_launch()
    if count == 1:
        return _fit_files(files, options, plugins, stores, out, form)
    problem = _find_launch_problem(device)
    if problem is not None:
        print_diagnostics([problem] if number == 0 else [])
        return INVALID_INPUT
    from mechdsl.fits.processes import join_processes
    from mechdsl.loading.devices import get_device

    cpu = get_device(device).type == "cpu"
    with join_processes(count, cpu=cpu), silence() if number else nullcontext():
        return _fit_files(files, options, plugins, stores, None if number else out, form)


def _find_launch_problem(device: str) -> Diagnostic | None:
    """Return the reason why several processes can't train together."""
    if find_spec("accelerate") is None:
        reason = "several processes that train together need accelerate, which isn't installed"
        return BadCommandLine(reason=reason, hint='install it: `pip install "mechdsl[offload]"`')
    if ":" in device:
        reason = f"`--device {device}` is one device, and each process needs its own"
        return BadCommandLine(reason=reason, hint=f"write `--device {device.partition(':')[0]}`")
    from mechdsl.loading.devices import explain_device_problem

    why = explain_device_problem(device)
    hint = "choose another device"
    return None if why is None else BadCommandLine(reason=f"`--device {device}`: {why}", hint=hint)


def _fit_files(
    files: tuple[Path, ...],
    options: RunOptions,
    plugins: tuple[str, ...],
    stores: StoreOptions,
    out: Path | None,
    form: str,
) -> int:
    """Train what files declare, and print it; return the exit status."""
    paths, problems = find_mech_files(files)
    problems += load_plugins(plugins)
    everything: list[CheckedFile] = []
    for path in paths if not problems else ():
        checked, diagnostics = check_mech_file(path, options.settings)
        problems += diagnostics
        everything += [] if checked is None else [checked]
    print_diagnostics(problems)
    if has_errors(problems):
        return INVALID_INPUT
    done: list[TrainedFit] = []
    status = SUCCESS
    for checked in everything:
        try:
            diagnostics, own, status_of_file = train_with_bar(checked, options, stores)
        except KeyboardInterrupt as error:
            return report_interruption(error, CONTINUES)
        done += diagnostics
        problems += own
        status = max(status, status_of_file)
    if form == "json":
        _print_json(done, problems)
    elif done:
        from mechdsl.show.trainings import print_trained_fits

        print_trained_fits(done, make_console())
    if out is not None and not _copy(done, out, form):
        return INCOMPLETE
    return status


def _print_json(fits: Sequence[TrainedFit], problems: Sequence[Diagnostic]) -> None:
    """Print trainings, means over those with several seeds, and problems."""
    from mechdsl.show.trainings import group_by_seeds

    document = {
        "schema": 1,
        "fits": [each.to_dict() for each in fits],
        "seeds": [reports.to_dict() for reports in group_by_seeds(fits)],
        "diagnostics": [diagnostic_facts(problem) for problem in problems],
    }
    print_json(json.dumps(document, indent=1))


def train_with_bar(
    checked: CheckedFile, options: RunOptions, stores: StoreOptions, *, discovered: bool = False
) -> tuple[list[TrainedFit], list[Diagnostic], int]:
    """Train what a file declares, with a progress bar; return it, the printed problems and the exit
    status.

    discovered: train only the circuits that experiments discover.
    """
    from dataclasses import replace

    from mechdsl.fits.processes import own_processes
    from mechdsl.pipeline.trained_files import fits_of_file
    from mechdsl.pipeline.trainings import train_file
    from mechdsl.show.progress import ProgressBar, StepCounter
    from mechdsl.store.store import store_folder

    source = checked.source
    if not fits_of_file(checked):
        print_line(f"{source.name} declares no trainings that its experiments use", out=False)
        return [], [], SUCCESS
    folder = store_folder(source.path, stores.named, untrusted=options.settings.untrusted)
    if folder is None and discovered:
        return [], [], SUCCESS  # the run reports what isn't trained
    if folder is None:
        reason = "trainings are kept in a store, and this run has none"
        hint = "name a folder: `--store FOLDER`"
        problems: list[Diagnostic] = [BadCommandLine(reason=reason, hint=hint)]
        print_diagnostics(problems)
        return [], problems, INVALID_INPUT
    bar = ProgressBar(source.name, unit="steps")
    try:
        with bar:
            run_options = replace(options, store=folder)
            done, problems = train_file(
                checked, run_options, on_progress=StepCounter(bar).advance, discovered=discovered
            )
    except Exception as error:
        if not own_processes().is_first:
            raise
        return [], [], report_failure(f"training for {source.name}", error)
    print_diagnostics(problems)
    return done, problems, INCOMPLETE if has_errors(problems) else SUCCESS


def _copy(fits: Sequence[TrainedFit], out: Path, form: str) -> bool:
    """Copy dictionaries with their cards; return whether that succeeded."""
    from mechdsl.pipeline.trainings import export_fits

    problems: list[Diagnostic] = []
    try:
        for name, target in export_fits(fits, out):
            print_line(f"{name} copied to {target}", out=form == "table")
    except FileExistsError as error:
        reason = f"`{error.filename}` is there already, and nothing is overwritten"
        problems.append(BadCommandLine(reason=reason, hint="name another folder"))
    except OSError as error:
        reason = f"`--out {out}`: {(error.strerror or str(error)).lower()}"
        problems.append(BadCommandLine(reason=reason, hint="name a writable folder"))
    print_diagnostics(problems)
    return not problems


@click.command(short_help="Write a model of a file, such as an edited one, to a folder.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--weights",
    required=True,
    type=click.Path(path_type=Path),
    help="The new folder, which `from_pretrained` of transformers loads.",
)
@click.option("--model", help="The model; by default the file's only edited model or sum.")
@set_option
@device_option
@dtype_option
@allow_python_option
@untrusted_option
@plugin_option
@collect_check_options
def export(
    file: Path,
    weights: Path,
    model: str | None,
    device: str,
    dtype: str | None,
    plugins: tuple[str, ...],
    checks: CheckOptions,
) -> int:
    """Write a model of FILE, with its edits, to a folder that transformers loads."""
    how = checks.settings()
    checked = check_and_print(file, how, plugins)
    if checked is None:
        return INVALID_INPUT
    from mechdsl.base.text import count_noun
    from mechdsl.pipeline.loaded_models import export_model
    from mechdsl.pipeline.options import RunOptions

    options = RunOptions(settings=how, device=device, dtype=dtype)
    found, problems = export_model(checked, model, weights, options)
    print_diagnostics(problems)
    if found is None:
        return INVALID_INPUT
    size = count_noun(found.parameters, "weight")
    print_line(
        f"{found.name} written to {found.folder}: {found.architecture}, {size}, {found.dtype}"
    )
    if not found.has_tokenizer:
        print_line("the folder has no tokenizer: save it with `tokenizer.save_pretrained`")
    return SUCCESS
