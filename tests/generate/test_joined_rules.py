"""Joining rules into few writes keeps their effect."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
import torch

from mechdsl.forward.generation.rules import RowChoice, StepEdge, StepRules, join_step_rules
from mechdsl.forward.hooks.batch import EdgeWrite, RuleWrites, SiteWrite

ROWS, STEPS = 5, 4


def some_rules(chance: random.Random) -> StepRules:
    rows = torch.tensor(chance.sample(range(ROWS), chance.randint(1, 3)))
    count = len(rows)
    nothing, values = torch.zeros(count, dtype=torch.long), torch.rand(count, chance.choice([1, 4]))
    write = SiteWrite(
        chance.choice(["z", "mlp_out"]),
        0,
        rows,
        nothing,
        nothing,
        values,
        chance.choice(["set", "add"]),
    )
    edge = EdgeWrite(
        1, "reweight", rows, nothing, nothing, torch.arange(count), nothing, values[:, 0]
    )
    what = chance.choice(["write", "edge", "blocks"])
    return StepRules(
        chance.choice([1, 1, 2]),
        chance.choice([None, None, 3]),
        writes=[write] if what == "write" else [],
        edges=[StepEdge(edge)] if what == "edge" else [],
        blocks=((("", chance.randint(0, 1)), chance.choice([None, 2])),)
        if what == "blocks"
        else (),
    )


def done(acting: RuleWrites) -> object:
    """All operations on each vector and on the attention of each row, in order."""
    found: defaultdict[object, list[object]] = defaultdict(list)
    for write in acting.writes:
        places = zip(write.rows, write.positions, write.units, write.values, strict=True)
        for row, position, unit, values in places:
            place = write.where, int(row), int(position), int(unit)
            found[place].append((write.mode, values.tolist()))
    for edge in acting.edges:
        entries = zip(edge.entries, edge.keys, edge.amounts, strict=True)
        for entry, key, amount in entries:
            row, query = int(edge.rows[entry]), int(edge.queries[entry])
            found[edge.layer, row, query].append((int(key), float(amount)))
    return dict(found), dict(acting.blocks)


@pytest.mark.parametrize("seed", range(60))
def test_joined_rules_do_the_same_as_separate_rules(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    rules = [some_rules(chance) for _ in range(chance.randint(2, 8))]
    few = join_step_rules(rules, ROWS)
    rows = chance.sample(range(ROWS), 4)
    prompts, newest = torch.tensor([3, 4, 5, 6]), torch.tensor([7, 8, 9, 10])
    for step in range(1, STEPS + 1):
        own = [RowChoice(ROWS, rows).step(each, step, prompts, newest) for each in (rules, few)]
        assert done(own[0]) == done(own[1])


def test_rules_of_neighbouring_rows_are_joined_into_one_write() -> None:
    nothing, values = torch.zeros(1, dtype=torch.long), torch.ones(1, 4)
    cells = [
        SiteWrite("z", 0, torch.tensor([row]), nothing, nothing, values) for row in range(ROWS)
    ]
    (only,) = join_step_rules([StepRules(1, writes=[write]) for write in cells], ROWS)
    (write,) = only.writes
    assert write.rows.tolist() == list(range(ROWS))
