"""The header comment of a file of `examples/systems`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples" / "systems"
MOST_LINES = 120
VERDICTS = ("shown", "shown in part", "not shown")

_HEAD = re.compile(
    r"mech 1\n\n# Paper: (?P<paper>.+)\n# Claim: (?P<claim>.+)\n"
    r"# Found \((?P<verdict>[a-z ]+)\) on (?P<model>.+?): (?P<found>.+)\n\n"
)


@dataclass(frozen=True)
class System:
    """One published experiment as a file."""

    path: Path
    number: str
    paper: str
    claim: str
    verdict: str
    model: str
    found: str

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")


def read(path: Path) -> System:
    """Read a file's header; raise ValueError if one of the three lines is missing."""
    head = _HEAD.match(path.read_text(encoding="utf-8"))
    number = re.match(r"\d\d", path.name)
    if head is None or number is None or head["verdict"] not in VERDICTS:
        raise ValueError(f"{path.name} doesn't begin with its paper, claim and what was found")
    return System(path=path, number=number[0], **head.groupdict())


def systems() -> list[System]:
    """All published experiments, in the order of their numbers."""
    return [read(path) for path in sorted(FOLDER.glob("*.mech"))]
