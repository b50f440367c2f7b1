"""Defaults of transformers' model configs: `python -m tests.models.library_defaults`.

The table has those defaults of each model type that its shape depends on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mechdsl.models.config import (
    DEFAULTS_FILE,
    KEY_GROUPS,
    SUBCONFIG_KEYS,
    add_defaults,
    shape_from_config,
)
from mechdsl.models.shape import ModelShape

Shapes = tuple[ModelShape | None, ...]


def shapes(config: Mapping[str, Any]) -> Shapes:
    """Shapes of a config, as a decoder and as its own type; None where it has none."""
    found: list[ModelShape | None] = []
    for architectures in (["ForCausalLM"], []):
        try:
            shape, _ = shape_from_config({**config, "architectures": architectures})
        except Exception:  # the class has no defaults
            shape = None
        found.append(shape and replace(shape, config={}))
    return tuple(found)


def whole(kind: str) -> dict[str, Any]:
    """A model type's config with all defaults; empty if it needs arguments."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind]().to_dict()
    except Exception:  # some argument is required
        return {}


def kept(kind: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a type that its shapes depend on; those of subconfigs are in the table."""
    config = {k: v for k, v in whole(kind).items() if v is not None and k != "model_type"}
    for part in SUBCONFIG_KEYS:
        if isinstance(config.get(part), Mapping):
            config[part] = {"model_type": config[part].get("model_type", "")}

    def seen() -> Shapes:
        return shapes(add_defaults(config, KEY_GROUPS, kind, table))

    wanted = seen()
    for key in [key for key in config if key not in SUBCONFIG_KEYS]:
        value = config.pop(key)
        if seen() != wanted:
            config[key] = value
    return config


def table() -> dict[str, dict[str, Any]]:
    """All model types whose shapes follow from the selected defaults."""
    from transformers import CONFIG_MAPPING

    divided = {
        k for k in CONFIG_MAPPING if any(isinstance(whole(k).get(p), dict) for p in SUBCONFIG_KEYS)
    }
    found: dict[str, dict[str, Any]] = {}
    for kind in sorted(CONFIG_MAPPING, key=lambda kind: (kind in divided, kind)):
        entry = kept(kind, found)
        wanted = shapes(whole(kind))
        if any(wanted) and shapes(add_defaults(entry, KEY_GROUPS, kind, found)) == wanted:
            found[kind] = entry
    return found


def main() -> None:
    rows = [f"{json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in sorted(table().items())]
    DEFAULTS_FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    print(f"{len(rows)} kinds")


if __name__ == "__main__":
    main()
