"""What the values of a run hang on beside its plan: models, devices, precisions, code."""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.base.digest import digest
from mechdsl.base.numeric_settings import numeric_settings
from mechdsl.base.registry import OUTSIDE
from mechdsl.execute.kept_values import KeptRun
from mechdsl.execute.numeric_version import NUMERIC_VERSION
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.loading.identity import identity_of_loaded
from mechdsl.pipeline.run_options import RunOptions
from mechdsl.program.code_behind import CodeUnknown, code_behind, code_of_module
from mechdsl.program.python_files import functions_of
from mechdsl.results.versions import version_of
from mechdsl.store.runs import OpenRun
from mechdsl.validate.check_file import Checked

PACKAGES = ("torch", "transformers")
"""Whose versions may change any number."""


def kept_run(
    run: OpenRun, checked: Checked, models: Mapping[str, LoadedModel], options: RunOptions
) -> KeptRun:
    """Where a run's values are kept. A model that can't be told from others is left out."""
    try:
        code = _code(checked)
    except CodeUnknown:
        return KeptRun(run, {})
    merged = any(model.base is not None for model in checked.program.models.values())
    packages = (*PACKAGES, "peft") if merged else PACKAGES
    images = any(block.kind == "images" for block in checked.program.prompts.values())
    packages = (*packages, "pillow") if images else packages
    common = digest(
        NUMERIC_VERSION,
        [version_of(package) for package in packages],
        numeric_settings(),
        sorted(options.without),
        options.execution.side,
        code,
    )
    found: dict[str, bytes] = {}
    for name, model in models.items():
        identity = identity_of_loaded(model)
        if identity is not None:
            attention = model.provenance.get("attention")
            found[name] = digest(common, identity, str(model.dtype), model.device.type, attention)
    return KeptRun(run, found)


def _code(checked: Checked) -> dict[str, str]:
    """The user's own code that may make numbers: modules that have added to the language, and what
    the file's functions import. The functions themselves are in the keys of what hangs on them."""
    found = code_behind([each.path.read_bytes() for each in functions_of(checked.program)])
    for module in sorted(OUTSIDE):
        found |= code_of_module(module)
    return found
