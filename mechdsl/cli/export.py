"""`mechdsl export`: a model of a file as a transformers folder."""

from __future__ import annotations

from pathlib import Path

import click

from mechdsl.cli.arguments import (
    allow_python_option,
    check_mech_file,
    load_plugins,
    plugin_option,
    set_option,
    settings_from_options,
    untrusted_option,
)
from mechdsl.cli.output import INVALID_INPUT, SUCCESS, print_diagnostics, print_line
from mechdsl.diagnostics.core import has_errors


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
@click.option("--device", default="auto", help="Device: auto, cpu, cuda or cuda:N.")
@click.option("--dtype", help="Precision of the weights, instead of the file's.")
@allow_python_option
@untrusted_option
@plugin_option
def export(
    file: Path,
    weights: Path,
    model: str | None,
    parameters: tuple[str, ...],
    device: str,
    dtype: str | None,
    allow_python: bool,
    untrusted: bool,
    plugins: tuple[str, ...],
) -> int:
    """Write a model of FILE, with its edits, to a folder that transformers loads."""
    problems = load_plugins(plugins)
    if problems:
        print_diagnostics(problems)
        return INVALID_INPUT
    how = settings_from_options(
        parameters, allow_python=allow_python, allow_outside=False, untrusted=untrusted
    )
    checked, problems = check_mech_file(file, how)
    print_diagnostics(problems)
    if checked is None or has_errors(problems):
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
