"""`local("runs/step-*")`, `zoo("induction/step-*")`: one model for every folder that matches, in
natural order."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mechdsl import zoo
from mechdsl.base.names import name_list
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.diagnostics.e04_model import ModelNotFound
from mechdsl.program import spec
from mechdsl.program.named_paths import LOCAL, path_to_read

STAR = "*"


def checkpoints(model: spec.Model, diagnostics: list[Diagnostic]) -> Sequence[spec.Model]:
    """The models that a statement defines: itself, or what matches the `*` of its path.

    Codes: E0207 for a path with several stars, or one that is not of a folder; E0401 where nothing
    matches.
    """
    if STAR in (model.revision or ""):
        diagnostics.append(
            BadArgument(
                span=model.span,
                name=f"{model.revision}",
                reason="has a `*`, which only folders may have",
                hint='write one revision, or the folder of several: `local("runs/step-*")`',
            )
        )
        return []
    if STAR not in model.path:
        return [model]
    if model.path.count(STAR) > 1 or model.kind not in ("local", "zoo"):
        only = model.kind in ("local", "zoo")
        diagnostics.append(
            BadArgument(
                span=model.span,
                name=model.path,
                reason="has more than one `*`"
                if only
                else "has a `*`, which only folders may have",
                hint='write one, for the part that differs: `local("runs/step-*")`',
            )
        )
        return []
    before, _, after = model.path.partition(STAR)
    parent, slash, start = before.rpartition("/")
    if model.kind == "zoo":
        found = _of_the_zoo(before, after)
    else:
        folder, problems = path_to_read(LOCAL, parent or slash, model.span)
        if folder is None:
            diagnostics.extend(problems)
            return []
        found = matching(folder, start, after)
    if not found:
        diagnostics.append(
            ModelNotFound(
                span=model.span,
                model=model.name,
                path=model.path,
                place="the zoo" if model.kind == "zoo" else "the folder of the file",
                advice=f"no folder matches; it has {name_list(zoo.zoo_models())}"
                if model.kind == "zoo"
                else "no folder matches; write the path from the `.mech` file, with `*` for the "
                "part that differs",
            )
        )
    return [
        model.model_copy(
            update={
                "name": f"{model.name}:{matched}",
                "path": model.path.replace(STAR, matched),
                "matched": matched,
            }
        )
        for matched in found
    ]


def _of_the_zoo(before: str, after: str) -> list[str]:
    """What `*` stands for in names of the zoo."""
    pattern = re.compile(f"{re.escape(before)}([^/]+){re.escape(after)}")
    found = [match[1] for name in zoo.zoo_models() if (match := pattern.fullmatch(name))]
    return sorted(found, key=_natural)


def matching(folder: Path, start: str, after: str) -> list[str]:
    """What `*` stands for in the folders that match, as people count: `step-9` before `step-10`.

    start, after: what stands before `*` in a folder's name, and all behind it.
    """
    end, slash, rest = after.partition("/")
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    found = [
        name[len(start) : len(name) - len(end)]
        for name in names
        if name.startswith(start) and name.endswith(end) and len(name) > len(start) + len(end)
        if start or not name.startswith(".")
        if os.path.isdir(folder / name / rest if slash else folder / name)
    ]
    return sorted(found, key=_natural)


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Digits as numbers, so that 9 comes before 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return [(0, int(p), p) if p[0].isdigit() and p.isascii() else (1, 0, p) for p in parts]
