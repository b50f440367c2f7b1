"""Bounding boxes of an SVG's texts, from positions, letter widths and rotations."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"
Matrix = tuple[float, float, float, float, float, float]
Point = tuple[float, float]
SAME: Matrix = (1, 0, 0, 1, 0, 0)

WIDTHS = {
    **dict.fromkeys("ijl", 222),
    **dict.fromkeys(" !,./:;It[]\\f", 278),
    **dict.fromkeys("()-r`{}", 333),
    **dict.fromkeys("Jckvsxyz", 500),
    **dict.fromkeys("abdeghnopqu0123456789_?L#$", 556),
    **dict.fromkeys("+<=>~−", 584),
    **dict.fromkeys("FTZ", 611),
    **dict.fromkeys("ABEKPSVXY&", 667),
    **dict.fromkeys("CDHNRUw", 722),
    **dict.fromkeys("GOQ", 778),
    **dict.fromkeys("Mm", 833),
    "'": 191,
    "|": 260,
    '"': 355,
    "*": 389,
    "·": 278,
    "%": 889,
    "W": 944,
    "@": 1015,
}
"""Widths of Helvetica's letters in thousandths of the font size (Adobe's font metrics)."""
MONO, BOLD, OTHER = 602, 1.06, 1000
ABOVE, BELOW = 0.72, 0.18
"""Height of letters above and below the baseline, relative to the font size."""


@dataclass(frozen=True)
class Text:
    """One line of text with the corners of its box, in points of the picture."""

    text: str
    corners: tuple[Point, Point, Point, Point]
    title: str
    """Tooltip."""
    size: float


def texts_of(svg: str) -> list[Text]:
    """Return all drawn lines of text."""
    return list(_walk(ElementTree.fromstring(svg), SAME, {}, ""))


def overlaps(texts: list[Text], least: float = 0.5) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes overlap by more than `least` points on every axis."""
    boxes = [(_bounds(each), each) for each in texts]
    return [
        (first.text, second.text)
        for (a, first), (b, second) in combinations(boxes, 2)
        if min(a[2], b[2]) - max(a[0], b[0]) > least
        and min(a[3], b[3]) - max(a[1], b[1]) > least
        and _apart(first, second) < -least
    ]


def outside(svg: str) -> list[str]:
    """Return texts cut off at the picture's edge."""
    root = ElementTree.fromstring(svg)
    shown = root.get("viewBox") or f"0 0 {root.attrib['width']} {root.attrib['height']}"
    width, height = map(float, shown.split()[2:])  # with a width in inches, pixels are scaled
    return [
        each.text
        for each in texts_of(svg)
        for left, top, right, bottom in [_bounds(each)]
        if left < -1 or top < -1 or right > width + 1 or bottom > height + 1
    ]


def _walk(
    node: ElementTree.Element, matrix: Matrix, given: dict[str, str], title: str
) -> Iterator[Text]:
    said = node.find(f"{SVG}title")
    title = title if said is None else said.text or ""
    matrix = _times(matrix, _transform(node.get("transform", "")))
    names = ("font-size", "font-family", "font-weight", "text-anchor", "opacity")
    given = {**given, **{name: node.attrib[name] for name in names if name in node.attrib}}
    if node.tag == f"{SVG}text":
        yield from _lines(node, matrix, given, title)
        return
    for child in node:
        yield from _walk(child, matrix, given, title)


def _lines(
    node: ElementTree.Element, matrix: Matrix, given: dict[str, str], title: str
) -> Iterator[Text]:
    if float(given.get("opacity", "1")) == 0:  # vega hides labels by opacity 0
        return
    x, y = float(node.get("x", "0")), float(node.get("y", "0"))
    parts = [(node.text or "", x, y)]
    for span in node.iter(f"{SVG}tspan"):
        y += float(span.get("dy", "0"))
        parts.append((span.text or "", float(span.get("x", str(x))), y))
    size = float(given.get("font-size", "16").removesuffix("px"))
    for text, left, line in parts:
        if not text.strip():
            continue
        width = float(node.get("textLength", _width(text, size, given)))
        left -= {"middle": width / 2, "end": width}.get(given.get("text-anchor", ""), 0)
        right, top, bottom = left + width, line - ABOVE * size, line + BELOW * size
        corners = ((left, top), (right, top), (right, bottom), (left, bottom))
        a, b, c, d = (_moved(matrix, corner) for corner in corners)
        yield Text(text, (a, b, c, d), title, size)


def _width(text: str, size: float, given: dict[str, str]) -> float:
    if "Mono" in given.get("font-family", ""):
        return size * len(text) * MONO / 1000
    wide = BOLD if given.get("font-weight") in ("bold", "600", "700") else 1
    return size * sum(WIDTHS.get(char, OTHER) for char in text) / 1000 * wide


def _transform(text: str) -> Matrix:
    found = SAME
    for kind, numbers in re.findall(r"(\w+)\(([^)]*)\)", text):
        values = [float(number) for number in re.split(r"[ ,]+", numbers.strip())]
        if kind == "translate":
            step: Matrix = (1, 0, 0, 1, values[0], values[1] if values[1:] else 0)
        elif kind == "rotate":
            turn = math.radians(values[0])
            step = (math.cos(turn), math.sin(turn), -math.sin(turn), math.cos(turn), 0, 0)
        else:
            raise ValueError(f"a drawing has `{kind}`, which isn't read here")
        found = _times(found, step)
    return found


def _times(m: Matrix, n: Matrix) -> Matrix:
    (a, b, c, d, e, f), (g, h, i, j, k, p) = m, n
    return (
        a * g + c * h,
        b * g + d * h,
        a * i + c * j,
        b * i + d * j,
        a * k + c * p + e,
        b * k + d * p + f,
    )


def _moved(m: Matrix, point: Point) -> Point:
    x, y = point
    return m[0] * x + m[2] * y + m[4], m[1] * x + m[3] * y + m[5]


def _bounds(text: Text) -> tuple[float, float, float, float]:
    xs, ys = zip(*text.corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _apart(first: Text, second: Text) -> float:
    """Return the widest gap between two boxes along their sides; negative if they overlap."""
    gaps: list[float] = []
    for box in (first, second):
        a, b, _, d = box.corners
        for end in (b, d):
            x, y = end[0] - a[0], end[1] - a[1]
            length = math.hypot(x, y) or 1.0
            one, other = (
                [(px * x + py * y) / length for px, py in each.corners] for each in (first, second)
            )
            gaps.append(max(min(one) - max(other), min(other) - max(one)))
    return max(gaps)
