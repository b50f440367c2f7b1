"""What a run hangs on, as one key: with the same key a run gives the same results.

Rather too much goes in than too little. What a `python(…)` function reads while it runs is beyond
it, and so is what a script changes in torch or transformers.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from mechdsl.base.numeric_settings import active_mode, numeric_settings
from mechdsl.base.own_code import own_code
from mechdsl.base.registry import OUTSIDE
from mechdsl.execute.options import Options
from mechdsl.models.identity import Hashed, digest_of, identity_of_folder
from mechdsl.models.locate import locate
from mechdsl.pipeline.run_options import RunOptions
from mechdsl.program.code_behind import CodeUnknown, code_behind, code_of_module
from mechdsl.program.python_files import functions_of
from mechdsl.prompts.prompt_table import PromptTable, Run, RunRow
from mechdsl.resolve.observation import Observation
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.results.versions import version_of, versions
from mechdsl.validate.check_file import Checked, Settings, models_needed

if TYPE_CHECKING:
    from mechdsl.hooks.loaded import LoadedModel

OF_SETTINGS = (
    "parameters",
    "limit",
    "only",
    "python",
    "require_models",
    "allow_outside",
    "untrusted",
    "prompts_enough",
)
OF_OPTIONS = ("dtype", "offload", "without")
OF_EXECUTION = ("side", "pass_tokens", "prompt_tokens", "allow_nan")
"""Fields that go in as they are."""
LEFT_OUT: Mapping[type, Mapping[str, str]] = {
    Settings: {"build": "what it makes goes in as the models do"},
    RunOptions: {
        "settings": "those that the file was checked with go in",
        "device": "what it means on this machine goes in",
        "execution": "field by field",
        "out": "what is written there goes with the archived run",
        "on_profile": "only looks on",
        "ends": "whether experiments run one by one goes in; a run that was ended isn't archived",
        "store": "where it lies changes nothing",
        "fresh": "asks for the same",
        "hashes": "a run with a key has them",
    },
    Options: {"on_progress": "only looks on"},
}
"""The other fields, and why they don't: `tests/pipeline/test_run_key.py` asks for all."""


class NoKey(Exception):
    """A run can't be told from others; the text says why, in lower case."""


def run_key(
    checked: Checked,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel],
    *,
    device: str,
    hashed: Hashed,
) -> str:
    """SHA-256 of all that a run's results hang on.

    loaded: models of Python, by name. device: the kind that `options.device` means here. hashed:
    SHA-256 of a file.
    Raises NoKey where that can't be told, OSError where a file can't be read.
    """
    return digest_of(key_parts(checked, options, loaded, device=device, hashed=hashed))


def key_parts(
    checked: Checked,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel],
    *,
    device: str,
    hashed: Hashed,
) -> dict[str, Any]:
    """What goes into the key, as JSON has it. Arguments and exceptions as of `run_key`."""
    if checked.unchecked or checked.unrun:
        raise NoKey("a part of the file could not be checked")
    mode = active_mode()
    if mode is not None:
        raise NoKey(f"torch's functions may be changed by a `{mode}`, which is active")
    known = {**checked.built, **loaded}
    models = _Models(checked, known, hashed)
    try:
        python = _python(checked)
    except CodeUnknown as unknown:
        raise NoKey(str(unknown)) from None
    return {
        "schema": 1,
        "texts": [source.text for source in checked.program.sources],
        "parameters": _told(checked.program.parameters),
        "settings": {name: _told(getattr(checked.settings, name)) for name in OF_SETTINGS},
        "options": {
            **{name: _told(getattr(options, name)) for name in OF_OPTIONS},
            "offload": options.offload is not None,
            "one by one": options.ends is not None,
        },
        "execution": {name: _told(getattr(options.execution, name)) for name in OF_EXECUTION},
        "device": device,
        "machine": [platform.system(), platform.machine(), platform.python_version()],
        "numbers": numeric_settings(),
        "prompts": _tables(checked.experiments),
        "python": python,
        "models": {name: models.told(name) for name in models_needed(checked)},
        "versions": _versions(checked, options),
        "code": own_code(),
    }


def _told(value: Any) -> Any:
    """A setting as JSON: `1` isn't `1.0`, nor `"1"`."""
    if isinstance(value, Mapping):
        return {str(name): _told(each) for name, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_told, value))
    return repr(value)


def _versions(checked: Checked, options: RunOptions) -> dict[str, str]:
    models = checked.program.models.values()
    more = ["safetensors"]
    more += ["peft"] if any(model.base is not None for model in models) else []
    images = any(block.kind == "images" for block in checked.program.prompts.values())
    more += ["pillow"] if images else []
    more += ["accelerate"] if options.offload is not None else []
    return {**versions(), **{package: version_of(package) for package in more}}


def _python(checked: Checked) -> dict[str, Any]:
    """The user's own code: files that the file names, and modules that have added to the language,
    with what they import of his."""
    files: dict[str, str] = {}
    contents: list[bytes] = []
    for function in functions_of(checked.program):
        content = function.path.read_bytes()
        if sha256(content).hexdigest() != function.digest:
            raise CodeUnknown(f"`{function.file}` has changed since it was checked")
        files[function.file] = function.digest
        contents.append(content)
    beside = code_behind(contents)
    for module in sorted(OUTSIDE):
        beside |= code_of_module(module)
    return {"files": files, "beside": beside}


class _Models:
    """What each model is, and where those run that Python has handed over."""

    def __init__(self, checked: Checked, known: Mapping[str, Any], hashed: Hashed) -> None:
        self._checked = checked
        self._known = known
        self._hashed = hashed

    def told(self, name: str) -> dict[str, Any]:
        if name in self._known:
            return self._of_python(name, self._known[name])
        model = self._checked.program.models[name]
        return {
            "identity": self._identity(name),
            "dtype": model.dtype,
            "bos": model.bos,
            "base": None if model.base is None else self.told(model.base),
            "folder": self._snapshot(name),
        }

    def _of_python(self, name: str, model: LoadedModel) -> dict[str, Any]:
        return {
            "identity": self._identity(name),
            "dtype": str(model.dtype),
            "device": _device_words(model),
            "source": model.provenance.get("source", ""),
        }

    def _identity(self, name: str) -> str:
        if name in self._known:
            from mechdsl.loading.identity import identity_or_reason

            found, reason = identity_or_reason(self._known[name])
            if found is None:
                raise NoKey(f"it can't be told what model `{name}` is: {reason}")
            return found
        model = self._checked.program.models[name]
        folder, _ = locate(model, model.span.source.folder)
        base = None if model.base is None else self._identity(model.base)
        found = None
        if folder is not None:
            found = identity_of_folder(model, folder, self._hashed, base=base)
        if found is None:
            raise NoKey(f"the files of model `{name}` can't be read")
        return found

    def _snapshot(self, name: str) -> str:
        """The commit of a snapshot in the library's cache, which results name."""
        model = self._checked.program.models[name]
        folder, _ = locate(model, model.span.source.folder)
        inside = folder is not None and folder.parent.name == "snapshots"
        return folder.name if folder is not None and inside else ""


def _device_words(model: LoadedModel) -> str:
    if model.device.type != "cuda":
        return model.device.type
    import torch

    return f"cuda {torch.cuda.get_device_name(model.device)}"


# --- prompts --------------------------------------------------------------------------------------


def _tables(experiments: Iterable[ResolvedExperiment]) -> dict[str, str]:
    """By experiment, the digest of all that its prompts are."""
    done: dict[int, str] = {}
    found: dict[str, str] = {}
    for each in experiments:
        if id(each.table) not in done:
            done[id(each.table)] = _table(each.table)
        steered = [rule.direction for rule in each.every_rule if rule.direction is not None]
        saved = [vector.digest for direction in steered for vector in direction.saved]
        saved += [] if each.model.opposite is None else [each.model.opposite.digest]
        for rule in each.rules:
            if isinstance(rule.does, Observation):
                saved += rule.does.made_of.values()
        found[each.key] = " ".join([done[id(each.table)], *saved])
    return found


def _table(table: PromptTable) -> str:
    digest = sha256()

    def take(*parts: object) -> None:
        digest.update(f"{parts!r}\n".encode("utf-8", "surrogatepass"))

    take(table.name, table.row_ids, table.row_keys, sorted(table.conventions.items()))
    take(table.data_hash, sorted(table.other_data.items()), table.moved, table.moved_text)
    take([(each.name, each.digest) for each in table.python])
    for name, run in table.runs.items():
        take(name, run.name, run.prompts, run.model, _noise(run))
        for row in run.rows:
            take(*_row(row))
    for name, other in sorted(table.beside.items()):
        take(name, _table(other))
    return digest.hexdigest()


def _noise(run: Run) -> tuple[object, ...]:
    noise = run.noise
    if noise is None:
        return ()
    told = (noise.site, noise.positions, noise.std, noise.sds, noise.sd_tokens)
    return (*told, noise.samples, noise.kind, noise.row_keys)


def _row(row: RunRow) -> tuple[object, ...]:
    texts = [(name, each.text, each.ids, each.of_output) for name, each in row.texts.items()]
    spans = [tuple(each) for each in row.spans]
    return row.text, row.ids, row.offsets, row.special, spans, list(row.values.items()), texts
