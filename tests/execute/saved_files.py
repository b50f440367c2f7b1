"""What `save` lines have left in a folder, to be compared with what others leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


def taken_away(folder: Path) -> dict[str, dict[str, Any]]:
    """What was saved, which is gone then: file → its tensors, and the lines beside it."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        rows = path.with_suffix(".jsonl")
        found[path.name] = {**load_file(path), "rows": rows.read_text(encoding="utf-8")}
        path.unlink()
        rows.unlink()
    return found


def same_files(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]], text: str) -> None:
    """The same vectors of the same rows, up to rounding."""
    assert one.keys() == other.keys(), text
    for name, tensors in one.items():
        assert tensors.keys() == other[name].keys(), text
        for key, values in tensors.items():
            if key == "rows" or values.dtype.kind == "i":
                assert np.array_equal(values, other[name][key]), text
            else:
                atol, rtol = (5e-2, 5e-3) if values.itemsize == 2 else (2e-4, 1e-3)
                np.testing.assert_allclose(values, other[name][key], rtol, atol, err_msg=text)
