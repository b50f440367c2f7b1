"""Plugins: installed modules that add to the language, each loaded only if the user names it.

A package offers a plugin as an entry point of the group `mechdsl.plugins`, which names a module.
Importing the module registers its rule kinds, metrics, corruptions, direction methods,
estimators, aggregates, statistics, baseline images and layouts of image tokens.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mechdsl.base.records import external_modules
from mechdsl.base.text import name_list
from mechdsl.diagnostics.command_line import PluginNotLoaded
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.program.code_hashes import hash_module_code, hash_package_code, note_package_code

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

PLUGIN_GROUP = "mechdsl.plugins"


@dataclass(frozen=True)
class Plugin:
    """A plugin that this process has loaded."""

    name: str
    module: str
    package: str
    """The installed package that offers it."""
    version: str


LOADED_PLUGINS: dict[str, Plugin] = {}
"""By name. Like imported modules, plugins stay loaded until the process ends."""


def load_plugins(names: Sequence[str]) -> list[Diagnostic]:
    """Import plugins. Codes: E0211, for a name that is not installed and a failed import."""
    wanted = dict.fromkeys([names] if isinstance(names, str) else names)
    new = [name for name in wanted if name not in LOADED_PLUGINS]
    if not new:
        return []
    from importlib.metadata import entry_points

    points = entry_points(group=PLUGIN_GROUP)
    problems: list[Diagnostic] = []
    for name in new:
        entries = [point for point in points if point.name == name]
        problem = (
            _import_plugin(entries[0])
            if len(entries) == 1
            else _choice_problem(name, entries, sorted(points.names))
        )
        problems += [] if problem is None else [problem]
    return problems


def _choice_problem(
    name: str, entries: Sequence[EntryPoint], installed: Sequence[str]
) -> PluginNotLoaded:
    if entries:
        packages = name_list([_package(entry)[0] for entry in entries])
        return PluginNotLoaded(
            plugin=name,
            reason=f"is provided by {packages}",
            hint="uninstall all but one of these packages",
        )
    if not installed:
        hint = "no plugin is installed; install the package that provides it"
    else:
        noun = "plugin" if len(installed) == 1 else "plugins"
        known = f"installed {noun}: {name_list(installed)}"
        suggestion = did_you_mean(name, installed, "")
        hint = f"{suggestion} {known[0].upper()}{known[1:]}" if suggestion else known
    return PluginNotLoaded(plugin=name, reason="is not installed", hint=hint)


def _import_plugin(entry: EntryPoint) -> PluginNotLoaded | None:
    """Import the module of an entry point. Returns E0211 if that raises an exception."""
    try:
        note_package_code(entry.module)
        entry.load()
        package, version = _package(entry)
        LOADED_PLUGINS[entry.name] = Plugin(entry.name, entry.module, package, version)
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return PluginNotLoaded(
            plugin=entry.name,
            reason=f"can't be imported: {said}",
            hint=f"correct {_origin(error) or f'`{entry.value}`'}",
        )
    return None


def _origin(error: BaseException) -> str:
    """The line of the plugin that raised an error; empty if none did."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"`{Path(error.filename).name}`, line {error.lineno}"
    ours = str(Path(__file__).parents[1])
    frames = [
        frame_summary
        for frame_summary in traceback.extract_tb(error.__traceback__)
        if not frame_summary.filename.startswith((ours, "<frozen"))
        and Path(frame_summary.filename).parent.name not in ("importlib", "metadata")
    ]
    return f"`{Path(frames[-1].filename).name}`, line {frames[-1].lineno}" if frames else ""


def _package(entry: EntryPoint) -> tuple[str, str]:
    """Name and version of the package that offers a plugin."""
    if entry.dist is None:
        return entry.module.partition(".")[0], "unknown"
    return entry.dist.name, entry.dist.version


def hash_plugin_code() -> dict[str, str]:
    """Return module → SHA-256 of all loaded plugins, and of what they import.

    Raises CodeHashError if a source can't be read, or has changed since it was imported.
    """
    plugin_codes: dict[str, str] = {}
    for plugin in LOADED_PLUGINS.values():
        plugin_codes |= hash_package_code(plugin.module)
    return plugin_codes


def hash_extension_code() -> dict[str, str]:
    """Return module → SHA-256 of all modules that extend the language, loaded plugins among them,
    and of what they import of the user's code. Raises CodeHashError as `hash_plugin_code`."""
    hashes: dict[str, str] = {}
    for module in sorted(external_modules()):
        hashes |= hash_module_code(module)
    return hashes | hash_plugin_code()


def plugin_versions() -> dict[str, str]:
    """Return package → version of all loaded plugins."""
    return {plugin.package: plugin.version for plugin in LOADED_PLUGINS.values()}
