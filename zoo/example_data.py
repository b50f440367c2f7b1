"""Writes the data that the examples read: `python -m zoo.example_data --out examples/data`.

Seeded, so that it writes the same files anywhere:

many.jsonl, few.jsonl: lists for `zoo("counting")` with many items, and with few.
facts.jsonl: what `zoo("facts")` learned, with an object that is wrong.
quiz.jsonl: four options each, for `zoo("facts")`; those that its training had may be among them.
brackets.jsonl: what `zoo("nested/formal")` learned, without the last bracket.
words.jsonl: what each task of `zoo("tasks")` makes of a word.
questions.jsonl: every verb with every object that `zoo("refusal")` knows, and what it replies.
items.jsonl: the items of the sequences of `zoo("succession")` except numerals, with their values.
sums.jsonl: lists of four parts for `zoo("worked")` that training didn't have.
clips.jsonl: frames of two moving shapes for `zoo("frames")` that training doesn't have together.
more_clips.jsonl: other clips of this kind, to test what was chosen on those.
things.jsonl: fields of things for `zoo("hidden-rules")` that training didn't have with these rules.
years.jsonl: periods for `zoo("years")` that training didn't have, and all later and earlier years.
partitioned.jsonl: images of rows of shapes, each row behind a symbol; where they lie in pixels.
fog.jsonl: faint shapes for `zoo("counting-vlm")`, and a shape that is there or not.
scenes.jsonl: clear shapes for `zoo("counting-vlm")`, with each kind of question.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from numpy.random import default_rng

from zoo.counting.data import ITEMS
from zoo.counting_vlm import data as counting_vlm
from zoo.facts.data import LETTERS, RELATIONS, another, facts
from zoo.frames import data as frames
from zoo.hidden_rules import data as hidden_rules
from zoo.language import different, is_held_out
from zoo.nested.data import BRACKETS, stream
from zoo.refusal import data as refusal
from zoo.succession.data import SEQUENCES
from zoo.tasks import data as tasks
from zoo.vlm import THINGS as SHAPES
from zoo.vlm import choose
from zoo.worked import data as worked
from zoo.years import data as years

SEED = 16
ROWS = 64
MORE = 136
"""Clips of `more_clips.jsonl`."""
THINGS = 8
"""Of each rule and decision."""
MANY, FEW = range(7, 10), range(2, 5)
PERIODS = 200
FOGGY, CLEAR = 100, 40
"""Images of each relation, and of each kind of question."""
SYMBOLS = ("#", "@", "$", "%")
SIDE = 32
"""Pixels of an image; it has a row for every symbol."""

Record = Mapping[str, object]


def lists(counts: Iterable[int]) -> list[Record]:
    """Different texts that ask for the number of items, which is one of `counts`."""
    known = sorted(counts)
    rng = random.Random(f"{SEED} {known}")
    found: dict[str, Record] = {}
    while len(found) < ROWS:
        count = rng.choice(known)
        text = f"Part 1: {' '.join(rng.choice(ITEMS) for _ in range(count))} Count 1:"
        found[text] = {"text": text, "count": count}
    return list(found.values())


def known_facts() -> list[Record]:
    """Every fact in every way to say it."""
    rng = random.Random(SEED)
    return [{**row, "rival": another(rng, row["kind"], row["attribute"])} for row in facts()]


def quizzes() -> list[Record]:
    """Facts with four options; each letter is right in a quarter of them."""
    rng = random.Random(SEED)
    chosen = rng.sample(facts(), 4 * ROWS)
    found: list[Record] = []
    for number, row in enumerate(chosen):
        right = number % len(LETTERS)
        wrong = [each for each in RELATIONS[row["kind"]][1] if each != row["attribute"]]
        options = rng.sample(wrong, 3)
        options.insert(right, row["attribute"])
        named = dict(zip((letter.lower() for letter in LETTERS), options, strict=True))
        found.append({**row, **named, "letter": LETTERS[right]})
    return found


def bracket_texts() -> list[Record]:
    """Texts of brackets that training didn't have, and the bracket that closes them."""
    texts = different(stream(SEED, BRACKETS, held_out=True), 2 * ROWS)
    return [
        {"text": each.text[:-2], "closing": each.text[-1], "length": len(each.text.split())}
        for each in texts
    ]


def questions() -> list[Record]:
    """What may be asked, whether it is forbidden (1) or not, and what is replied: `advice` where
    it isn't refused, `past_advice` where people did it."""
    found: list[Record] = []
    for forbidden, held_out in itertools.product((False, True), repeat=2):
        for verb, thing in refusal.pairs(forbidden, held_out):
            tool, how = refusal.VERBS[verb]
            found.append({
                "verb": verb,
                "thing": thing,
                "tool": tool,
                "how": how,
                "harmful": int(verb in refusal.HARMFUL),
                "owned": int(thing in refusal.OWNED),
                "forbidden": int(forbidden),
                "held_out": int(held_out),
                "advice": refusal.Question(verb, thing, False).answer(),
                "past_advice": refusal.Question(verb, thing, True).answer(),
            })  # fmt: skip
    return found


def items() -> list[Record]:
    """Items with their value, its last digit, and the item of the same sequence with value 5."""
    return [
        {
            "item": item,
            "sequence": name,
            "value": value,
            "units": value % 10,
            "item_of_five": of.items[5 - of.first],
        }
        for name, of in SEQUENCES.items()
        if name != "numerals"
        for value, item in enumerate(of.items, of.first)
    ]


def sums() -> list[Record]:
    """Lists of four parts of two to nine items: `one` to `four`, their counts, the first without
    its last item (`less`), the total, and what is about right."""
    rng = random.Random(SEED)
    found: dict[str, Record] = {}
    while len(found) < 4 * ROWS:
        words = rng.sample(ITEMS, rng.choice((1, 2, 3, 5)))
        counts = [rng.randint(2, worked.MAX_ITEMS) for _ in range(4)]
        parts = tuple(tuple(rng.choice(words) for _ in range(count)) for count in counts)
        text = worked.write(parts, worked.STEPS)
        if worked.is_held_out(text):
            found[text.content] = {
                **dict(zip(("one", "two", "three", "four"), map(" ".join, parts), strict=True)),
                **dict(zip("abcd", counts, strict=True)),
                "less": " ".join(parts[0][:-1]),
                "total": sum(counts),
                "fives": worked.about(sum(counts)),
            }  # fmt: skip
    return list(found.values())


def clips(count: int) -> list[Record]:
    """Different clips with a shape whose motion is asked, which frame 3 shows."""
    rng, found = default_rng(SEED), list[Record]()
    while len(found) < count:
        clip = frames.draw_clip(rng, held_out=True)
        asked, other = clip
        row, column = asked.cell(2)
        if frames.cells(clip, 2)[row][column] != asked.thing or asked.motion == other.motion:
            continue
        cells = (cells_of(frames.cells(clip, frame)) for frame in range(frames.FRAMES))
        record: Record = {
            **{f"f{number}": each for number, each in enumerate(cells, 1)},
            "thing": asked.thing,
            "way": asked.motion,
            "opposite": frames.OPPOSITE[asked.motion],
            "other": other.motion,
            "row": row + 1,
            "col": column + 1,
        }
        if record not in found:
            found.append(record)
    return found


def things() -> list[Record]:
    """Things that training didn't have with a rule, the same number for each rule and decision.

    `field` lists the values of the fields, and `used` those that the decision depends on.
    """
    rng, found = random.Random(SEED), dict[str, Record]()
    for rule, decision in itertools.product(hidden_rules.RULES, hidden_rules.DECISIONS):
        tree, size = hidden_rules.trees()[rule], len(found)
        while len(found) < size + THINGS:
            thing = hidden_rules.draw_thing(rng)
            text = hidden_rules.describe(rule, thing)
            if tree.decide(thing) == decision and is_held_out(text, hidden_rules.HELD_OUT_SHARE):
                found[text] = {
                    "text": text,
                    "rule": rule,
                    **thing,
                    "field": list(thing.values()),
                    "used": [thing[name] for name in tree.used],
                    "decision": decision,
                    "other": next(each for each in hidden_rules.DECISIONS if each != decision),
                }
    return list(found.values())


def periods() -> list[Record]:
    """Periods with their later years, and with the first year and earlier ones."""
    drawn = (each for each in years.stream(SEED, held_out=True) if each.content[-2] not in "09")
    found: dict[str, Record] = {}
    while len(found) < PERIODS:
        text = next(drawn)
        noun, century, first = text.content.split()
        last, number = text.text.split()[-1], years.YEARS.index(first) + 1
        found[text.content] = {
            "noun": noun,
            "century": century,
            "begin": first,
            "end": last,
            "later": years.YEARS[number:],
            "earlier": years.YEARS[:number],
        }
    return list(found.values())


def partitioned() -> list[Record]:
    """Images of four rows, the symbols shuffled; one row is asked, another is the rival.

    Boxes are [left, top, right, bottom] in pixels, of the shapes without the symbol in front.
    """
    rng = random.Random(SEED)
    height = SIDE // len(SYMBOLS)
    found: list[Record] = []
    for number in range(ROWS):
        symbols = rng.sample(SYMBOLS, len(SYMBOLS))
        asked, rival = rng.sample(range(len(SYMBOLS)), 2)
        boxes = [[height, row * height, SIDE, (row + 1) * height] for row in (asked, rival)]
        found.append({
            "file": f"partitioned/{number:02}.png",
            "row": asked + 1,
            "symbols": symbols,
            "symbol_a": symbols[asked],
            "symbol_b": symbols[rival],
            "box_a": boxes[0],
            "box_b": boxes[1],
        })  # fmt: skip
    return found


def foggy() -> list[Record]:
    """Faint shapes in cells where training has none like them, and a shape that is asked.

    `relation`: the shape is `present`, or else the `companion` of one in the image, or `other`.
    """
    rng, found = default_rng(SEED + 1), list[Record]()
    wanted = dict.fromkeys(("present", "companion", "other"), FOGGY)
    while any(wanted.values()):
        scene = counting_vlm.draw_scene(rng, held_out=True, fog=True)
        expected = {counting_vlm.COMPANIONS.get(thing) for thing in scene.things}
        asked = choose(SHAPES, rng)
        relation = "present" if asked in scene.things else "other"
        if relation == "other" and asked in expected:
            relation = "companion"
        if wanted[relation]:
            wanted[relation] -= 1
            found.append({
                "cells": cells_of(scene.faint(rng)),
                "marks": " ".join(scene.marks),
                "asked": asked,
                "relation": relation,
                "absent": int(relation != "present"),
                "truth": "yes" if relation == "present" else "no",
            })  # fmt: skip
    return found


def scenes() -> list[Record]:
    """Clear shapes in cells where training has none like them, with a question and its answer."""
    rng, found = default_rng(SEED + 1), list[Record]()
    for kind in counting_vlm.QUESTIONS:
        size = len(found)
        while len(found) < size + CLEAR:
            scene = counting_vlm.draw_scene(rng, held_out=True)
            turn = counting_vlm.ask(kind, scene, rng)
            if turn is not None:
                found.append({
                    "cells": cells_of(scene.rows),
                    "marks": " ".join(scene.marks),
                    "kind": kind,
                    "question": turn.question,
                    "reply": turn.answer,
                })  # fmt: skip
    return found


def cells_of(rows: Iterable[Iterable[str]]) -> str:
    """Write the cells of a grid as `image grid(rows: …)` reads them."""
    return " / ".join(", ".join(thing or "-" for thing in row) for row in rows)


def files() -> dict[str, list[Record]]:
    """File name → records."""
    return {
        "many.jsonl": lists(MANY),
        "few.jsonl": lists(FEW),
        "facts.jsonl": known_facts(),
        "quiz.jsonl": quizzes(),
        "brackets.jsonl": bracket_texts(),
        "words.jsonl": [*tasks.records()],
        "questions.jsonl": questions(),
        "items.jsonl": items(),
        "sums.jsonl": sums(),
        "clips.jsonl": clips(ROWS),
        "more_clips.jsonl": clips(ROWS + MORE)[ROWS:],
        "things.jsonl": things(),
        "years.jsonl": periods(),
        "partitioned.jsonl": partitioned(),
        "fog.jsonl": foggy(),
        "scenes.jsonl": scenes(),
    }


def text_of(records: Iterable[Record]) -> str:
    """One line a record."""
    return "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, records in files().items():
        (out / name).write_text(text_of(records), encoding="utf-8")


if __name__ == "__main__":
    main()
