"""Sites of trained groups in JSON files, `mask.json`.

`sites` lists the candidates, `["z", 2, 0]` or `["resid_post", 3, null, null, 12]`, `labels` their
names, `scores` or `probabilities` a number for each, and `chosen` the numbers of those of the
group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard, cast

from mechdsl.base.files import UnreadableFile
from mechdsl.base.records import Record, record
from mechdsl.base.source import Span
from mechdsl.base.text import count_noun
from mechdsl.syntax import ast

SavedPoint: TypeAlias = tuple[str, int | None, int | None]
"""Site, layer and unit."""

_FORM = "write the file with `mechdsl fit FILE --out FOLDER`"

_ROWS_UNKNOWN = "it doesn't say which rows its {}s were chosen on, so they may be measured here"


LISTED_SITES = 8
"""Members of a group that a convention lists."""


class _Candidate(NamedTuple):
    """One entry of `sites`."""

    point: SavedPoint
    number: int | None
    """Of a dimension; None for a site."""


@record
class SavedMask(Record):
    """The group of a file."""

    digest: str
    """SHA-256 of the file."""
    chosen: tuple[_Candidate, ...]
    """The group, in the order of the candidates."""
    ranked: tuple[_Candidate, ...]
    """The group, best first."""
    last: tuple[SavedPoint, ...]
    """For each site and layer of the candidates, the one with the largest unit."""
    made: str
    """What was read, for conventions."""

    def list_sites(self, span: Span) -> tuple[ast.Site, ...]:
        """Return the group: a site for each member, or the dimensions of each vector."""
        found: dict[SavedPoint, list[int]] = {}
        for point, number in self.chosen:
            found.setdefault(point, []).extend(() if number is None else (number,))
        return tuple(_site(point, numbers, span) for point, numbers in found.items())

    def list_ranked(self, span: Span) -> tuple[ast.Site, ...]:
        """Return each member, best first."""
        return tuple(
            _site(point, () if number is None else (number,), span) for point, number in self.ranked
        )


def is_mask(content: object) -> TypeGuard[dict[str, Any]]:
    """Whether the content of a JSON file is a trained mask."""
    return isinstance(content, dict) and {"labels", "sites", "chosen"} <= content.keys()


def read_mask(content: Mapping[str, Any], digest: str, written: str) -> SavedMask:
    """Read the group of a `mask.json`.

    Args:
        digest: SHA-256 of the file.
        written: The path as the user wrote it.

    Raises:
        UnreadableFile: The file is malformed, or has edges, positions or features.
    """
    listed = content["sites"]
    _reject_others(listed, written)
    try:
        every = [_candidate(each) for each in listed]
        given = content["scores" if "scores" in content else "probabilities"]
        scores = [math.nan if own is None else float(own) for own in given]
        chosen = [int(number) for number in content["chosen"]]
        whole = all(isinstance(number, int) and number >= 0 for number in content["chosen"])
        sound = whole and len(set(chosen)) == len(chosen) > 0 and len(scores) == len(every)
        sound = sound and all(math.isfinite(scores[number]) for number in chosen)
        sound = sound and len({number is None for _, number in every}) == 1
        if not sound or len(set(every)) < len(every):
            raise ValueError
        ranked = chosen
        if not content.get("ranked"):
            ranked = sorted(chosen, key=lambda each: (-abs(scores[each]), each))
        group = tuple(every[number] for number in ranked)
    except (KeyError, TypeError, ValueError, IndexError):
        reason = f"`{written}` has no group: `chosen` has the numbers of some of its `sites`"
        raise UnreadableFile(reason, _FORM) from None
    what = "site" if every[0].number is None else "dimension"
    made = f"{len(group):,} of {count_noun(len(every), what)} of {written}: {_name(group)}; "
    made += f"SHA-256 {digest[:12]}…; {_ROWS_UNKNOWN.format(what)}"
    listed = tuple(every[number] for number in sorted(chosen))
    return SavedMask(digest, listed, group, tuple(_last_points(every)), made)


def _reject_others(listed: object, written: str) -> None:
    """Raise UnreadableFile for edges, positions and features."""
    entries = cast("list[Any]", listed) if isinstance(listed, list) else []
    first = cast("list[Any]", entries[0]) if entries and isinstance(entries[0], list) else []
    if len(first) > 5:
        reason = f"`{written}` is a circuit of edges"
        raise UnreadableFile(reason, f'read it as a circuit: `circuit c = saved("{written}")`')
    if len(first) == 1:
        reason = f"`{written}` has positions, which depend on the prompts"
        hint = "write them where they are used: `ablate z layer 1 head 0 at subject tokens …`"
        raise UnreadableFile(reason, hint)
    if len(first) == 5 and isinstance(first[3], str):
        reason = f"`{written}` has features of `{first[3]}`, and doesn't identify this basis"
        hint = f"list the features: `group g = features 3, 12 of {first[3]}`"
        raise UnreadableFile(reason, hint)


def _candidate(entry: Any) -> _Candidate:
    """Return an entry of `sites`. Raises ValueError and TypeError."""
    site, layer, unit, *rest = entry
    numbers = [each for each in (layer, unit) if each is not None]
    if rest:
        basis, number = rest
        numbers.append(number)
        if basis is not None:
            raise ValueError
    whole = all(isinstance(own, int) and not isinstance(own, bool) and own >= 0 for own in numbers)
    if not re.fullmatch(r"[a-z_]{1,40}( [a-z]{1,40})?", site) or not whole:
        raise ValueError
    return _Candidate((site, layer, unit), rest[1] if rest else None)


def _name(group: Sequence[_Candidate]) -> str:
    """Return the first members of a group as a file names them, for conventions."""
    names: list[str] = []
    for (site, layer, unit), number in group[:LISTED_SITES]:
        axes = ("layer", layer), (_unit_word(site), unit), ("dim", number)
        words = (f"{word} {own}" for word, own in axes if own is not None)
        names.append(" ".join((site, *words)))
    more = len(group) - len(names)
    return ", ".join(names) + (f" and {more:,} more" if more else "")


def _unit_word(site: str) -> ast.AxisWord:
    """Return the word before the number of a unit."""
    return "neuron" if site.split()[0] == "mlp_hidden" else "head"


def _last_points(candidates: Iterable[_Candidate]) -> Iterator[SavedPoint]:
    """Yield for each site and layer the candidate with the largest unit."""
    found: dict[tuple[str, int | None], int | None] = {}
    for (site, layer, unit), _ in candidates:
        old = found.get((site, layer))
        found[site, layer] = unit if old is None or unit is None else max(old, unit)
    for (site, layer), unit in found.items():
        yield site, layer, unit


def _site(point: SavedPoint, numbers: Sequence[int], span: Span) -> ast.Site:
    """Return a site, or dimensions of its vector, as a file names it."""
    site, layer, unit = point
    given: dict[ast.AxisWord, Sequence[int]] = {
        "layer": () if layer is None else (layer,),
        _unit_word(site): () if unit is None else (unit,),
        "dim": numbers,
    }
    axes = tuple(
        ast.Axis(name, True, _values(own, span), span=span) for name, own in given.items() if own
    )
    return ast.Site(tuple(ast.Name(each, span=span) for each in site.split()), axes, span=span)


def _values(numbers: Sequence[int], span: Span) -> tuple[ast.AxisRange, ...]:
    return tuple(ast.AxisRange(ast.Bound(each, span=span), span=span) for each in numbers)
