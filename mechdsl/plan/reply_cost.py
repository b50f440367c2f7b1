"""What replies cost: all that is computed behind the prefill, at most, as rows that end leave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.plan.columns import prompt_lengths
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows


@dataclass(frozen=True)
class ReplyWork:
    """Steps of replies that a panel's rows write; the prefill is counted with the rows."""

    forwards: int
    tokens: int
    """Through one block each."""
    keys: int
    """Pairs of a query and a key, in one block each."""
    logits: int
    """Distributions over the vocabulary."""


def reply_work(
    lengths: Ints, tokens: int, samples: int, *, kept: bool, pass_tokens: int
) -> ReplyWork:
    """The work behind prompts of these lengths, [row].

    tokens: what a reply has at most. kept: keys and values of earlier tokens are, and rows ride in
    one pass; else each step of each row is a whole pass over its prompt and its reply so far.
    """
    steps = np.arange(1, tokens, dtype=np.int64)
    rows = len(lengths) * samples
    whole = lengths[:, None] + steps
    if kept:
        together = -(-int(lengths.sum()) * samples // pass_tokens)
        return ReplyWork(
            len(steps) * together, rows * len(steps), int(whole.sum()) * samples, rows * len(steps)
        )
    pairs = whole * (whole + 1) // 2
    return ReplyWork(
        rows * len(steps), int(whole.sum()) * samples, int(pairs.sum()) * samples, rows * len(steps)
    )


def writing_lengths(plan: ExperimentPlan, rows: Rows, *, unpatched: bool) -> Ints:
    """[row] tokens of the prompts behind which an experiment writes, draws of noise included.
    unpatched: those of its base and source run come to these rows."""
    found = [np.repeat(plan.lengths(rows), plan.draws)]
    if unpatched:
        experiment = plan.experiment
        names = dict.fromkeys((experiment.spec.base, experiment.spec.source))
        runs = [experiment.table.runs[name] for name in names if name is not None]
        found += [np.repeat(prompt_lengths(run), run.draws) for run in runs]
    return np.concatenate(found)
