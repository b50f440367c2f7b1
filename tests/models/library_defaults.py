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
        found.append(shape and without_config(shape))
    return tuple(found)


def without_config(shape: ModelShape) -> ModelShape:
    """A shape without the configs that it and its other stacks were read from."""
    others = {stack: without_config(own) for stack, own in shape.others.items()}
    texts = shape.texts and without_config(shape.texts)
    return replace(shape, config={}, others=others, texts=texts)


def whole(kind: str, **config: Any) -> dict[str, Any]:
    """A model type's config with all defaults; empty if it needs more arguments."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind](**config).to_dict()
    except Exception:  # some argument is required
        return {}


def kept(kind: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a type that its shapes depend on.

    Its subconfigs have the keys in which they differ from their own type's entry of the table.
    """
    config = drop_nulls(whole(kind))
    config.pop("model_type", None)

    def seen() -> Shapes:
        return shapes(add_defaults(config, KEY_GROUPS, kind, table))

    wanted = seen()
    for part in all_parts(config):
        for key in [key for key in part if key not in (*SUBCONFIG_KEYS, "model_type")]:
            value = part.pop(key)
            # A config may lack the other keys that only encoder-decoders have.
            if seen() != wanted or (key == "is_encoder_decoder" and value):
                part[key] = value
    return config


def drop_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config without keys that are null, also in its subconfigs."""
    found = {key: value for key, value in config.items() if value is not None}
    for key in SUBCONFIG_KEYS:
        if isinstance(found.get(key), Mapping):
            found[key] = {"model_type": "", **drop_nulls(found[key])}
    return found


def all_parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A config and its subconfigs."""
    own = [config[key] for key in SUBCONFIG_KEYS if isinstance(config.get(key), dict)]
    return [config, *(each for part in own for each in all_parts(part))]


def move_defaults(config: dict[str, Any], table: dict[str, dict[str, Any]]) -> None:
    """Move the defaults of the subconfigs' own types to the entries of these types.

    A config that has a subconfig gets the defaults of its type, not those of the whole model. The
    sizes in these entries stay as they are: the library computes others from a config's numbers.
    """
    sizes = {key for group in KEY_GROUPS for key in group}
    for part in all_parts(config)[1:]:
        kind = part["model_type"]
        usual, fixed = whole(kind), sizes if kind in table else set[str]()
        for key in [key for key in part if key not in (*SUBCONFIG_KEYS, "model_type", *fixed)]:
            if key in usual and usual[key] == part[key]:
                table.setdefault(kind, {})[key] = part.pop(key)


def find_differences(kind: str, table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Configs of a type whose shapes aren't the library's: without keys or with an empty part."""
    configs: list[dict[str, Any]] = [
        {},
        *({part: {}} for part in SUBCONFIG_KEYS if part in table[kind]),
    ]
    pairs = [(config, whole(kind, **config)) for config in configs]
    return [
        config
        for config, expected in pairs
        if expected and shapes(add_defaults(config, KEY_GROUPS, kind, table)) != shapes(expected)
    ]


def table() -> dict[str, dict[str, Any]]:
    """All model types of the library whose shapes follow from the selected defaults."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    sizes = {kind: len(all_parts(drop_nulls(whole(kind)))) for kind in CONFIG_MAPPING_NAMES}
    found: dict[str, dict[str, Any]] = {}
    for kind in sorted(sizes, key=lambda kind: (sizes[kind], kind)):
        if any(shapes(whole(kind))):
            found[kind] = {**found.get(kind, {}), **kept(kind, found)}
            move_defaults(found[kind], found)
            if find_differences(kind, found):
                del found[kind]
    return found


def main() -> None:
    rows = [f"{json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in sorted(table().items())]
    DEFAULTS_FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    print(f"{len(rows)} kinds")


if __name__ == "__main__":
    main()
