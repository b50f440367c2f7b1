"""What the values of a run hang on beside its plan: models, devices, precisions, code."""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.base.digest import digest
from mechdsl.base.registry import outside_code
from mechdsl.execute.kept_values import KeptRun
from mechdsl.execute.numeric_version import NUMERIC_VERSION
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.pipeline.run_options import RunOptions
from mechdsl.results.collect import versions
from mechdsl.store.runs import OpenRun

PACKAGES = ("torch", "transformers")
"""Whose versions may change any number."""


def kept_run(run: OpenRun, models: Mapping[str, LoadedModel], options: RunOptions) -> KeptRun:
    """Where a run's values are kept. A model that can't be told from others is left out."""
    code = outside_code()
    if code is None:
        return KeptRun(run, {})
    installed = versions()
    common = digest(
        NUMERIC_VERSION,
        [installed[name] for name in PACKAGES],
        sorted(options.without),
        options.execution.side,
        code,
    )
    found: dict[str, bytes] = {}
    for name, model in models.items():
        identity = model.provenance.get("weights")
        if identity is not None:
            attention = model.provenance.get("attention")
            found[name] = digest(common, identity, str(model.dtype), model.device.type, attention)
    return KeptRun(run, found)
