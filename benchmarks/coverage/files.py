"""Whole files of which the truth is known: how often does an `expect` hold that shouldn't?

Each layer of the model adds a number of its own, so that the logits tell which was taken out, and
the metrics look up what was drawn for the row in that cell. All else is as in any file: rows are
dealt out, runs planned, tokens found, effects computed and verdicts decided.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import mechdsl
from benchmarks.coverage.setting import Figure, Setting
from mechdsl.base.arrays import Floats, Ints
from mechdsl.show.reports.text import is_significant

COUNTS, ITEMS = 8, 4
ROWS = COUNTS * ITEMS
CELLS = 8
BASE, SOURCE = CELLS, CELLS + 1
"""Runs after those of the cells, in what is drawn."""
RUNS = CELLS + 2
MOST = 6.0
"""Per cent, that the upper end of a share stays below."""
HALF, WHOLE = 2500, 5000
"""Verdicts where half of the level is one side's, and where a verdict has all of it: so many that
the interval of 5 % ends below 6 %."""
A_FILE = 25
"""Measures, or experiments, of one file."""
POWER = 80.0
RIGHT = 0.75
GROUP = "whole files"
FUNCTIONS = """import numpy as np

DRAWN = np.load("drawn.npy")
ITEMS = ("apple", "pear", "plum", "fig")
LAYERS = {255 - 2**layer: layer for layer in range(8)}


def values(measure, logits, rows):
    found = []
    of_runs = (logits[:, 11:13] / logits[:, 10:11]).round().int().tolist()
    for (written, source), row in zip(of_runs, rows):
        run = LAYERS.get(written, len(LAYERS) + source)
        found.append(DRAWN[measure, run, 4 * (row["count"] - 2) + ITEMS.index(row["item"])])
    return logits.new_tensor(found)
"""
FUNCTION = """

def m{number}(logits, rows):
    return values({number}, logits, rows)
"""
HEAD = """mech 1

model m = local("none")

prompts fruit {
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  large = if count > 5 then 1 else 0
  end = "kiwi"
  template "{item} {count} {end}"
  answer " {count}"
  corrupt other { end = "grape" }
}
"""
EXPERIMENT = """
experiment {name} {{
  prompts {prompts}
  {source}ablate mlp_out layer * at last token with zero
  {lines}
}}
"""
Draw = Callable[[np.random.Generator, int], Floats]
"""(random, measures) -> [measure, run, row]."""


@cache
def model() -> tuple[Any, Any]:
    """Its stream is 1 in its first place, has the sum of 2^layer in the second, and marks the
    source in the third; the logits of 0, 1 and 2 are these, so that it says 1."""
    tokenizer = AutoTokenizer.from_pretrained(str(files("mechdsl") / "zoo" / "counting"))
    found = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=CELLS,
            num_attention_heads=1,
            num_key_value_heads=1,
            mlp_bias=True,
        )
    ).eval()
    embedded, out = found.model.embed_tokens.weight, found.lm_head.weight
    with torch.no_grad():
        for weight in (embedded, out):
            weight.zero_()
        layers: list[Any] = list(found.model.layers)
        for number, layer in enumerate(layers):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.mlp.down_proj.bias.zero_()
            layer.mlp.down_proj.bias[1] = 2**number
        embedded[:, 0] = 1
        embedded[tokenizer.convert_tokens_to_ids("grape"), 2] = 1
        for place, numeral in enumerate("012"):
            out[tokenizer.convert_tokens_to_ids(numeral), place] = 1
    return found, tokenizer


def results(
    experiments: str, drawn: Floats, rows: Sequence[dict[str, Any]] = ()
) -> mechdsl.Results:
    """Run a file with these experiments, on metrics m0, m1 … with what was drawn.

    drawn: [measure, run, row].
    rows: of the block `listed`.
    """
    metrics = [f'metric m{number} = python("metrics.py:m{number}")' for number in range(len(drawn))]
    functions = FUNCTIONS + "".join(FUNCTION.format(number=n) for n in range(len(drawn)))
    with TemporaryDirectory() as folder, chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", mechdsl.MechdslWarning)
        np.save("drawn.npy", drawn)
        Path("metrics.py").write_text(functions, encoding="utf-8")
        Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return mechdsl.run(
            HEAD + "\n".join(metrics) + "\n" + experiments,
            {"m": model()},
            allow_python=True,
            progress=False,
            store=False,
            write_reports=False,
        )


def experiment(
    name: str,
    lines: Sequence[str],
    *,
    source: bool = False,
    prompts: str = f"fruit limit {ROWS}",
) -> str:
    direction = "from other into clean\n  " if source else ""
    return EXPERIMENT.format(name=name, prompts=prompts, source=direction, lines="\n  ".join(lines))


# --- what is drawn

CORRELATED = np.array(
    [[3.0, 2.0, -2.0, 1.0, 0.0, -1.0, -3.0, 0.0], [2.0, 3.0, -3.0, -1.0, 1.0, 0.0, -1.0, -1.0]]
)
TRUTH = float(np.corrcoef(CORRELATED)[0, 1])


def null(random: np.random.Generator, measures: int, shape: str = "normal") -> Floats:
    """No cell has an effect over all items, though each has one of every single item: the items are
    dealt evenly, and these effects cancel. The noise of the base run is in all effects."""
    noise = random.normal(size=(measures, RUNS, ROWS))
    if shape == "exponential":
        noise[:, :CELLS] = random.exponential(size=(measures, CELLS, ROWS)) - 1
        noise[:, BASE] = 0
    of_items = np.tile([-1.2, -0.4, 0.4, 1.2], COUNTS)
    sides = np.array([(-1) ** cell for cell in range(CELLS)])
    noise[:, :CELLS] += sides[:, None] * of_items
    return noise


def planted(random: np.random.Generator, measures: int) -> Floats:
    """The first cell has an effect of 3, the next two of 2 and −2; the noise of an effect is √2."""
    drawn = null(random, measures)
    drawn[:, :3] += np.array([3.0, 2.0, -2.0])[:, None]
    return drawn


# --- what is asked


@dataclass(frozen=True)
class Line:
    """`expect` of a measure `{m}`, and of `{o}` of another experiment."""

    text: str
    whole: bool = False
    """Where a false verdict is one on either side."""
    power: bool = False

    def of(self, measure: str, other: str) -> str:
        return self.text.replace("{m}", measure).replace("{o}", other)

    def figure(self, effect: str = "delta") -> Figure:
        name = f"`{self.of(effect, effect)}`"
        return Figure(name, POWER) if self.power else Figure(name, high=MOST, surely=True)


NOTHING = (
    Line("{m}(layer: 2) > 0"),
    Line("abs({m}(layer: 2)) > 0", whole=True),
    Line("mean({m}) < 0"),
    Line("abs(mean({m})) > 0", whole=True),
    Line("max({m}) > 0"),
    Line("min({m}) < 0"),
    Line("argmax({m}) = L2.mlp_out"),
    Line("argmax({m}) != L2.mlp_out"),
    Line("{m}(layer: 1) > 0 or {m}(layer: 2) > 0 or {m}(layer: 3) < 0"),
    Line("not ({m}(layer: 1) < 0 and {m}(layer: 2) > 0)"),
    Line("{m}(layer: 1) - {m}(layer: 2) > 0"),
    Line("auroc({m}, large, L2.mlp_out) > 0.5"),
)
"""False where no cell has an effect."""
PLANTED = (
    Line("max({m}) < 3"),
    Line("min({m}) > -2"),
    Line("{m}(layer: 0) > 3"),
    Line("{m}(layer: 0) near 2 within 1"),
    Line("{m}(layer: 1) in 0..2"),
    Line("argmax({m}, layer: 1..2) != L1.mlp_out"),
    Line("argmax({m}) != L0.mlp_out"),
    Line("max({m}) > 0", power=True),
    Line("argmax({m}) = L0.mlp_out", power=True),
    Line("{m}(layer: 0) > 2", power=True),
    Line("abs({m}(layer: 2)) > 1", power=True),
)
"""False where the truth lies on the bound, and true beyond it."""


SKEWED = tuple(line for line in NOTHING if "mean" not in line.text)
OF_RATIOS = (
    Line("{m}(layer: 3) > 0"),
    Line("abs({m}(layer: 3)) > 0", whole=True),
    Line("{m}(layer: 0) > 0.75"),
    Line("{m}(layer: 0) near 0.5 within 0.25"),
    Line("max({m}) < 0.75"),
    Line("{m}(layer: 0) > 0.25", power=True),
)
"""Of recovery, where the source is 4 above the base."""
OF_PAIRS = (
    Line("mean({m}, layer 3) - mean({o} of other, layer 3) > 0"),
    Line("mean({m}) - mean({o} of other) < 0"),
)
OF_CORRELATIONS = (
    Line(f"pearson(delta, other) > {TRUTH:.4f}"),
    Line(f"pearson(delta, other) < {TRUTH:.4f}"),
    Line("pearson(delta, other) > 0.3", power=True),
)
OF_NONE = (Line("pearson(delta, other) > 0.5"),)


def with_source(random: np.random.Generator, measures: int) -> Floats:
    drawn = planted(random, measures)
    drawn[:, SOURCE] = drawn[:, BASE] + 4 + random.normal(0, 0.5, (measures, ROWS))
    return drawn


def pairs(random: np.random.Generator, measures: int, effects: Floats | None = None) -> Floats:
    """Those of one experiment, and behind them those of another on the same rows: most of their
    noise is the same.

    effects: [experiment, cell], or none.
    """
    one = null(random, measures)
    other = 0.9 * one + 0.4 * null(random, measures)
    if effects is not None:
        one[:, :CELLS] += effects[0][:, None]
        other[:, :CELLS] += effects[1][:, None]
    return np.concatenate([one, other])


def settings() -> Iterator[Setting]:
    yield from _of_measures("no effect", NOTHING, null)
    for test in ("flips", "bootstrap"):
        yield from _of_measures(
            f"no effect, `test {test}`", NOTHING[:6], null, stats=f"stats test {test}"
        )
    yield from _of_measures(
        "no effect, exponential", SKEWED, lambda random, count: null(random, count, "exponential")
    )
    yield from _of_measures("effects of 3, 2 and −2", PLANTED, planted)
    name = "effects of 3, 2 and −2, source less base of 4"
    first = "effects of 3, 2 and −2 of 4"
    yield from _of_measures(name, OF_RATIOS, with_source, "recovery", first_name=first)
    yield from _of_measures("no effect in two experiments", OF_PAIRS, pairs)
    yield _correlations("no effect in two experiments, correlation", OF_NONE, None)
    name = f"effects with a correlation of {TRUTH:.4f}"
    yield _correlations(name, OF_CORRELATIONS, CORRELATED)
    yield _families()
    yield _accuracies()


def _of_measures(
    name: str,
    lines: Sequence[Line],
    draw: Draw,
    effect: str = "delta",
    stats: str = "",
    first_name: str = "",
) -> Iterator[Setting]:
    """All measures of a file in one experiment."""
    first = f"{GROUP}: {first_name or name}"

    def run(random: np.random.Generator, count: int, asked: Sequence[Line]) -> Ints:
        drawn = draw(random, count)
        source = effect == "recovery"
        said = [f"measure m{number} as {effect}" for number in range(count)]
        said += [stats] if stats else []
        said += [
            f"expect {line.of(f'm{number}', f'm{count + number}')}"
            for line in asked
            for number in range(count)
        ]
        text = experiment("one", said, source=source)
        if len(drawn) > count:
            others = [f"measure m{count + number} as {effect}" for number in range(count)]
            text = experiment("other", others, source=source) + text
        outcomes = results(text, drawn)["one"].outcomes
        held = np.array([each.holds for each in outcomes]).reshape(len(asked), count)
        return np.stack([held.sum(1), np.full(len(asked), count)], axis=1)

    for repetitions in (HALF, WHOLE):
        asked = tuple(line for line in lines if line.whole == (repetitions == WHOLE))
        if asked:
            yield Setting(
                GROUP,
                name,
                tuple(line.figure(effect) for line in asked),
                partial(run, asked=asked),
                repetitions,
                chunk=A_FILE,
                first_key=first,
            )


def _correlations(name: str, lines: Sequence[Line], effects: Floats | None) -> Setting:
    """Two experiments each."""

    def run(random: np.random.Generator, count: int) -> Ints:
        text = "".join(
            experiment(f"other{number}", [f"measure m{count + number} as delta"])
            + experiment(
                f"one{number}",
                [f"measure m{number} as delta"]
                + [f"expect {line.text.replace('other', f'other{number}')}" for line in lines],
            )
            for number in range(count)
        )
        found = results(text, pairs(random, count, effects))
        outcomes = [found[f"one{number}"].outcomes for number in range(count)]
        held = np.array([[each.holds for each in of_one] for of_one in outcomes]).sum(0)
        return np.stack([held, np.full(len(lines), count)], axis=1)

    figures = tuple(line.figure() for line in lines)
    return Setting(GROUP, name, figures, run, HALF, chunk=A_FILE)


def _families() -> Setting:
    """An experiment each."""
    lines = ("max(m) > 0", "min(m) < 0", "abs(m(layer: 2)) > 0", "argmax(m) = L1.mlp_out")

    def run(random: np.random.Generator, count: int) -> Ints:
        said = ["stats correct holm verdicts holm", *(f"expect {line}" for line in lines)]
        text = "".join(
            experiment(
                f"e{number}",
                [f"measure m{number} as delta"]
                + [line.replace("(m", f"(m{number}") for line in said],
            )
            for number in range(count)
        )
        found = results(text, null(random, count)).experiments
        held = [
            sum(bool(is_significant(each, 0).any()) for each in found),
            sum(any(outcome.holds for outcome in each.outcomes) for each in found),
        ]
        return np.array([[each, count] for each in held])

    figures = (
        Figure("any cell survives", high=MOST, surely=True),
        Figure(f"any of {len(lines)} lines with `verdicts holm`", high=MOST, surely=True),
    )
    return Setting(GROUP, "no effect, families", figures, run, HALF, chunk=A_FILE)


def _accuracies() -> Setting:
    """The model says 1; how often that is right is a matter of the rows."""
    lines = (f"accuracy(clean) > {RIGHT:g}", f"accuracy(clean) < {RIGHT:g}")

    def run(random: np.random.Generator, count: int) -> Ints:
        right = random.random((count, ROWS)) < RIGHT
        blocks = [
            f"""
prompts p{number} {{
  rows "rows.jsonl" where file = {number}
  template "{{place}} {{file}} ="
  answer " {{right}}"
}}
"""
            for number in range(count)
        ]
        rows = [
            {"file": number, "place": place, "right": int(right[number, place])}
            for number in range(count)
            for place in range(ROWS)
        ]
        text = "".join(
            block
            + experiment(
                f"e{number}",
                ["measure logit(answer) as delta", *(f"expect {line}" for line in lines)],
                prompts=f"p{number}",
            )
            for number, block in enumerate(blocks)
        )
        found = results(text, np.zeros((1, RUNS, ROWS)), rows).experiments
        held = np.array([[each.holds for each in one.outcomes] for one in found]).sum(0)
        return np.stack([held, np.full(2, count)], axis=1)

    figures = tuple(Figure(f"`{line}`", high=MOST, surely=True) for line in lines)
    first = f"{GROUP}: {RIGHT:.0%} of answers right"
    name = f"{RIGHT:.0%} correct answers"
    return Setting(GROUP, name, figures, run, HALF, chunk=A_FILE, first_key=first)
