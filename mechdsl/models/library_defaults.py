"""Numbers that a `config.json` leaves out, as its class in transformers takes them for granted.

`library_defaults.json` has them for each kind of model, so that nobody waits for the library:
`python -m tests.models.library_defaults` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

TABLE = Path(__file__).with_suffix(".json")
PARTS = ("text_config", "vision_config", "decoder", "encoder")
"""Keys behind which the config of a part stands."""


@cache
def read_table() -> Mapping[str, Mapping[str, Any]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def with_defaults(
    config: Mapping[str, Any],
    alike: Iterable[tuple[str, ...]],
    kind: str = "",
    table: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The config with what the library takes for granted; as it is for a kind that isn't known.

    alike: keys that say the same, of which a config has one. kind: its `model_type`, where it
    doesn't say that itself. table: what each kind takes for granted, by default the package's.
    """
    kind = str(config.get("model_type", kind))
    table = read_table() if table is None else table
    known = table.get(kind, {})
    groups = {key: group for group in alike for key in group}
    found: dict[str, Any] = {"model_type": kind, **config} if kind else {**config}
    for key, value in known.items():
        if all(found.get(each) is None for each in groups.get(key, (key,))):
            found[key] = value
    for part in PARTS:
        given, expected = found.get(part), known.get(part, {})
        if isinstance(given, Mapping):
            own = cast("Mapping[str, Any]", given)
            found[part] = with_defaults(own, alike, expected.get("model_type", ""), table)
    return found
