"""What the rows of an experiment wrote (`generate n`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mechdsl.base.reply import Reply

Texts = Mapping[int, tuple[Reply, ...]]
"""Id of a prompt → what was written behind it: one reply for each sample and draw of noise."""


@dataclass(frozen=True)
class Replies:
    """Replies of cells and of unpatched runs; prompts go by their ids."""

    cells: tuple[Texts, ...] = ()
    """[cell]; a prompt that isn't part of a cell isn't there."""
    runs: Mapping[str, Texts] = field(default_factory=dict[str, Texts])
    """By name, those that are measured: the base run, and the source where effects need it."""
    prompts: Mapping[int, str] = field(default_factory=dict[int, str])
    """The text of each prompt in the base run."""

    def __bool__(self) -> bool:
        return bool(self.prompts)

    def shifted(self, by: int) -> Replies:
        """The same with other ids of prompts."""

        def moved(texts: Texts) -> Texts:
            return {row + by: own for row, own in texts.items()}

        return Replies(
            tuple(map(moved, self.cells)),
            {run: moved(texts) for run, texts in self.runs.items()},
            {row + by: text for row, text in self.prompts.items()},
        )


def beside(parts: Sequence[Replies], several: Sequence[str]) -> Replies:
    """Those of several variants, whose cells stand one behind the other. several: which one each
    is, where their runs differ."""
    runs: dict[str, Texts] = {}
    for part, which in zip(parts, several, strict=True):
        for run, texts in part.runs.items():
            name = f"{run} ({which})" if which else run
            runs[name] = {**runs.get(name, {}), **texts}
    return Replies(
        tuple(texts for part in parts for texts in part.cells),
        runs,
        {row: text for part in reversed(parts) for row, text in part.prompts.items()},
    )
