"""Draw the chart of the README from the results in `benchmarks/README.md`.

`python -m benchmarks.chart` writes `docs/benchmark.svg`. A bar is the fastest variant of a tool.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "README.md"
CHART = ROOT / "docs" / "benchmark.svg"
SWEEP = "W2"
NAMES = {
    "mechdsl": "mechdsl",
    "plain": "PyTorch hooks",
    "nnsight": "nnsight",
    "pyvene": "pyvene",
    "transformer-lens": "TransformerLens",
}
WIDTH, ROW, LEFT, TOP, SCALE_WIDTH = 720, 30, 200, 74, 420
INK, QUIET_INK, OWN_COLOUR, OTHER_COLOUR = "#222222", "#666666", "#2166ac", "#b8b8b8"
FONT = "Helvetica Neue, Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Bar:
    """The fastest variant of a tool."""

    name: str
    variant: str
    seconds: str
    """As the table prints it."""

    @property
    def label(self) -> str:
        """The tool, and its variant in brackets."""
        return f"{self.name} ({self.variant})" if self.variant else self.name


def section(text: str, sweep: str) -> str:
    """Return the results of a sweep."""
    found = re.search(rf"^### {sweep}: .*?(?=^###? |^<!-- results: end)", text, re.M | re.S)
    assert found is not None, f"no results of {sweep}"
    return found[0]


def bars(text: str, sweep: str = SWEEP) -> list[Bar]:
    """Return the bars, the fastest first."""
    fastest: dict[str, Bar] = {}
    for tool, seconds in re.findall(r"^\| ([\w-]+) \| (\d+\.\d+) \|", section(text, sweep), re.M):
        base = next((name for name in NAMES if tool == name or tool.startswith(f"{name}-")), None)
        if base is None:
            continue
        bar = Bar(NAMES[base], tool.removeprefix(base).lstrip("-"), seconds)
        if base not in fastest or float(seconds) < float(fastest[base].seconds):
            fastest[base] = bar
    return sorted(fastest.values(), key=lambda bar: float(bar.seconds))


def facts(text: str, sweep: str = SWEEP) -> tuple[str, str]:
    """Return the title and the conditions of a sweep."""
    part = section(text, sweep)
    cells = re.search(r"\| all (\d+) \|", part)
    batch = re.search(r"B=(\d+) T=(\d+)", part)
    run = re.search(r"^(\d{4}-\d\d-\d\d); (\d+ cores) .*? (\d+ threads)", text, re.M)
    assert cells is not None
    assert batch is not None
    assert run is not None
    title = f"Patch {cells[1]} heads of GPT-2 small, one at a time"
    return title, (
        f"{batch[1]} prompts of {batch[2]} tokens, fp32, {run[2]}, {run[3]}, no GPU; {run[1]}"
    )


def draw(text: str) -> str:
    """Return the chart of the results in a benchmark page."""
    title, conditions = facts(text)
    rows = bars(text)
    longest = max(float(bar.seconds) for bar in rows)
    height = TOP + ROW * len(rows) + 14

    def words(x: float, y: float, content: str, look: str) -> str:
        return f'<text x="{x:g}" y="{y:g}" {look}>{content}</text>'

    shapes = [
        words(20, 32, title, f'font-size="17" font-weight="bold" fill="{INK}"'),
        words(20, 54, f"seconds; {conditions}", f'font-size="12" fill="{QUIET_INK}"'),
    ]
    for number, bar in enumerate(rows):
        y = TOP + ROW * number
        own = bar.name == NAMES["mechdsl"]
        length = max(2.0, SCALE_WIDTH * float(bar.seconds) / longest)
        look = f'font-size="14" fill="{INK}"' + (' font-weight="bold"' if own else "")
        shapes += [
            words(LEFT - 10, y + 16, bar.label, f'{look} text-anchor="end"'),
            f'<rect x="{LEFT}" y="{y + 2}" width="{length:.1f}" height="20" rx="2" '
            f'fill="{OWN_COLOUR if own else OTHER_COLOUR}"/>',
            words(round(LEFT + length + 8, 1), y + 16, f"{bar.seconds} s", look),
        ]
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="{FONT}">\n'
        f'<rect width="100%" height="100%" rx="6" fill="white"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    CHART.write_text(draw(RESULTS.read_text(encoding="utf-8")), encoding="utf-8")
