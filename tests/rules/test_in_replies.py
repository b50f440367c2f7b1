"""Measures, observations and saves in replies, against a loop of plain passes over all tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.execute import unpatched_runs
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import bare, token, word_tokenizer, write_rows
from ..models import families
from ..quick import in_turn
from ..reference.forward import Changes, Edge, Run, Write, forward
from .models import double
from .support import (
    BLOCKS,
    QUICK,
    Array,
    Text,
    codes,
    compare,
    experiment,
    plain,
    product,
    records,
    rows,
    run_file,
    tokens,
    try_file,
)

NAMES = ("gpt2", "llama", "gpt_neox", "mistral")
EACH = [
    pytest.param(
        name, mode, marks=() if (mode == "plain") == (name == "gpt2") else pytest.mark.slow
    )
    for name in NAMES
    for mode in QUICK
]
"""Models and modes; one mode of each model isn't slow."""
FEW = [
    pytest.param(*each.values, marks=each.marks if each.values[0] == "llama" else pytest.mark.slow)
    for each in EACH
]
"""Models and modes for other metrics of the same logits; only one of them isn't slow."""
MOST = 6
GENERATE = f'generate {MOST} until " w4"'
"""Rows stop at different steps."""
Act = Callable[..., Changes]
"""Changes to row `n` of a model in a cell, from the number of tokens generated so far."""


@dataclass(frozen=True)
class Reply:
    """The reply of a row, and a pass over prompt and reply with the rules at the same steps."""

    prompt: int
    ids: tuple[int, ...]
    run: Run

    def at(self, reply_token: int) -> int | None:
        """The position of a token of the reply; 0 is the final prompt token, None a missing one."""
        return self.prompt - 1 + reply_token if reply_token <= len(self.ids) else None


def word(number: int) -> str:
    return f"w{number - len(families.SPECIAL)}"


def write(name: str, ids: Sequence[int], act: Callable[[int], Changes]) -> Reply:
    """Generate token by token, each time from the start."""
    found: list[int] = []
    ends = {double(name).config.eos_token_id}
    while len(found) < MOST:
        whole = [*ids, *found]
        run = forward(name, double(name), whole, *act(len(found)))
        newest = int(run.logits[-1].argmax())
        if newest in ends or (found and word(newest).startswith("w4")):
            break
        found.append(newest)
    run = forward(name, double(name), [*ids, *found], *act(len(found)))
    return Reply(len(ids), tuple(found), run)


def behind(name: str, ids: Sequence[int], reply: Reply) -> Run:
    """Run a prompt followed by this reply, without rules."""
    return unpatched_pass(name, (*ids, *reply.ids))


@lru_cache(maxsize=64)
def unpatched_pass(name: str, ids: tuple[int, ...]) -> Run:
    return forward(name, double(name), ids)


def const(value: float) -> Callable[[Tensor], Tensor]:
    return lambda now: torch.full_like(now, value)


def set_everywhere(
    layer: int, first: int = 0, last: int = MOST, value: float = 0.6, site: str = "attn_out"
) -> Callable[[int], Callable[[int], Changes]]:
    """`set SITE layer L at last token to 0.6 during step first..last`, from a prompt's length."""

    def of(prompt: int) -> Callable[[int], Changes]:
        def act(written: int) -> Changes:
            steps = range(first, min(last, written) + 1)
            return [Write(site, layer, const(value), prompt - 1 + s) for s in steps], []

        return act

    return of


@cache
def replies(name: str, layer: int, first: int = 0, last: int = MOST) -> tuple[Reply, ...]:
    """Replies of all rows."""
    return tuple(
        write(name, text.ids, set_everywhere(layer, first, last)(len(text.ids))) for text in rows()
    )


def entropy(logits: Tensor) -> float:
    log = logits.log_softmax(-1)
    return float(-(log.exp() * log).sum())


def kl(reference: Tensor, logits: Tensor) -> float:
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def two(logits: Tensor, n: int) -> float:
    own = records()[n]
    return float(logits[token(own["a"])] - logits[token(own["b"])])


TWO = "logit(answer) - logit(wrong)"
SET = "set attn_out layer 0..1 at last token to 0.6"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    from .support import write_data

    write_data(tmp_path)
    return tmp_path


def values(
    keys: Sequence[tuple[Coord, ...]], of: Callable[..., tuple[float, float] | None]
) -> tuple[Array, Array]:
    """([cell, row] with rules, [cell, row] without them); NaN where a row lacks the position."""
    found = [[of(n, *key) or (np.nan, np.nan) for n in range(len(rows()))] for key in keys]
    both = np.array(found)
    return both[..., 0], both[..., 1]


def at_token(
    name: str, layer: int, n: int, place: int, of: Callable[[Tensor, int], float]
) -> tuple[float, float] | None:
    """A metric of the logits at a token of the reply, with the rules and without."""
    reply = replies(name, layer)[n]
    at = reply.at(place)
    if at is None:
        return None
    bare = behind(name, rows()[n].ids, reply)
    return of(reply.run.logits[at], n), of(bare.logits[at], n)


def hold(
    found: ExperimentResult, axis: str, places: Sequence[Coord], of: Any, *, base: bool = True
) -> None:
    """of: (with rules, without) from a layer, a row and the number of a position."""
    assert found.axes == (axis, "layer")
    own = [(cell.coords[axis], cell.coords["layer"]) for cell in found.cells]
    assert own == product(places, (0, 1))
    keys = product(range(len(places)), (0, 1))
    patched, unpatched = values(keys, lambda n, place, layer: of(layer, n, place))
    assert np.isnan(patched).any()
    compare(found.measures[0], patched, unpatched if base else None)


def measured(data: Path, name: str, mode: str, measure: str, effect: str) -> ExperimentResult:
    text = experiment("e", GENERATE, SET, measure=f"measure {measure} as {effect}")
    return run_file(text, data, name, mode)["e"]


@pytest.mark.parametrize(("name", "mode"), EACH)
def test_entropy_at_each_step_equals_the_reference(data: Path, name: str, mode: str) -> None:
    """Step s predicts token s + 1; the base run reads the same text."""

    def of(layer: int, n: int, step: int) -> Any:
        return at_token(name, layer, n, step, lambda logits, n: entropy(logits))

    found = measured(data, name, mode, "entropy at each step", "delta")
    hold(found, "step", range(MOST), of)


@pytest.mark.parametrize(("name", "mode"), FEW)
def test_logit_difference_at_each_reply_token_equals_the_reference(
    data: Path, name: str, mode: str
) -> None:
    def of(layer: int, n: int, place: int) -> Any:
        return at_token(name, layer, n, place + 1, two)

    places = [f"reply {n + 1}" for n in range(MOST)]
    for said in ("each reply token", "each token of reply"):
        measure = f"logit(answer) - logit(wrong) at {said}"
        hold(measured(data, name, mode, measure, "delta"), "measured", places, of)


@pytest.mark.parametrize(("name", "mode"), FEW)
def test_loss_at_each_reply_token_equals_the_reference(data: Path, name: str, mode: str) -> None:
    """The loss of a token is read at the preceding token, which predicts it."""

    def of(layer: int, n: int, place: int) -> Any:
        reply = replies(name, layer)[n]
        if place >= len(reply.ids):
            return None
        own = reply.ids[place]
        return at_token(
            name, layer, n, place, lambda logits, n: -float(logits.log_softmax(-1)[own])
        )

    places = [f"reply {n + 1}" for n in range(MOST)]
    found = measured(data, name, mode, "loss at each reply token", "delta")
    hold(found, "measured", places, of)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), FEW)
def test_kl_to_other_runs_reads_the_same_reply(data: Path, name: str, mode: str) -> None:
    """`kl(RUN)` reads the prompt of that run, followed by the reply of the patched row."""
    for run in ("clean", "longer"):

        def of(layer: int, n: int, step: int, run: str = run) -> Any:
            reply = replies(name, layer)[n]
            at = reply.at(step)
            if at is None:
                return None
            ids = rows(run)[n].ids
            other = behind(name, ids, reply).logits[len(ids) - 1 + step]
            return kl(other, reply.run.logits[at]), 0.0

        found = measured(data, name, mode, f"kl({run}) at each step", "raw")
        hold(found, "step", range(MOST), of, base=False)


PLACES: dict[str, Callable[[Reply], int | None]] = {
    "last token of reply": lambda reply: len(reply.ids),
    "reply token": lambda reply: len(reply.ids),
    "first token of reply": lambda reply: 1,
    "first token of reply + 1": lambda reply: 2,
    "last token of reply - 1": lambda reply: len(reply.ids) - 1,
    "reply token 3": lambda reply: 3,
}
"""Positions of measures, and the token of the reply that each one names."""


@pytest.mark.parametrize(("name", "mode"), FEW)
def test_measures_at_single_reply_tokens_equal_the_reference(
    data: Path, name: str, mode: str
) -> None:
    """Rows whose reply lacks the token aren't part of the cell."""
    text = "".join(
        experiment(f"e{n}", GENERATE, SET, measure=f"measure {TWO} at {place} as delta")
        for n, place in enumerate(PLACES)
    )
    found = run_file(text, data, name, mode)
    for number, place in enumerate(PLACES.values()):

        def of(n: int, layer: int, place: Any = place) -> Any:
            reply = replies(name, layer)[n]
            at = place(reply)
            return at_token(name, layer, n, at, two) if 1 <= at <= len(reply.ids) else None

        patched, base = values(product((0, 1)), of)
        if np.isnan(patched).all():
            assert np.isnan(found[f"e{number}"].measures[0].patched).all()
        else:
            compare(found[f"e{number}"].measures[0], patched, base, most=False)


@pytest.mark.parametrize(("name", "mode"), FEW)
def test_measure_at_a_text_of_the_reply_equals_the_reference(
    data: Path, name: str, mode: str
) -> None:
    """It is the last token of the last occurrence; rows without it aren't part of the cell."""
    every = [word(each) for reply in replies(name, 0) for each in reply.ids]
    alone = [
        each for each in sorted(set(every)) if sum(o.startswith(each) for o in set(every)) == 1
    ]
    wanted = max(alone, key=every.count)

    def last(reply: Reply) -> int | None:
        at = [n for n, each in enumerate(reply.ids, start=1) if word(each) == wanted]
        return at[-1] if at else None

    measure = f'measure {TWO} at "{wanted}" of reply token as delta'
    text = experiment("e", GENERATE, SET, measure=measure)
    found = run_file(text, data, name, mode)["e"]

    def of(n: int, layer: int) -> Any:
        at = last(replies(name, layer)[n])
        return None if at is None else at_token(name, layer, n, at, two)

    patched, base = values(product((0, 1)), of)
    assert not np.isnan(patched).all()
    compare(found.measures[0], patched, base, most=False)


def own_words(name: str) -> list[str]:
    """A word of each row's reply, which differs between rows; no reply has the first row's."""
    every = [[word(each) for each in reply.ids] for reply in replies(name, 0)]
    words = {each for reply in every for each in reply}
    alone = [
        [each for each in reply if sum(o.startswith(each) for o in words) == 1] for reply in every
    ]
    assert all(alone[1:])
    return ["zebra", *(reply[n % len(reply)] for n, reply in enumerate(alone[1:]))]


def write_column(folder: Path, words: Sequence[str]) -> None:
    """Add the words to the data as a column."""
    write_rows(folder, [{**row, "said": f" {w} "} for row, w in zip(records(), words, strict=True)])


@pytest.mark.parametrize("place", ["said of reply token", "first token of said of reply"])
@pytest.mark.parametrize(("name", "mode"), FEW)
def test_measure_at_a_row_value_in_the_reply_equals_the_reference(
    data: Path, name: str, mode: str, place: str
) -> None:
    """Surrounding white space is ignored; rows whose reply lacks it aren't part of the cell."""
    words = own_words(name)
    assert len(set(words)) > 2
    write_column(data, words)
    measure = f"measure {TWO} at {place} as delta"
    found = run_file(experiment("e", GENERATE, SET, measure=measure), data, name, mode)["e"]

    def of(n: int, layer: int) -> Any:
        ids = replies(name, layer)[n].ids
        at = [k for k, each in enumerate(ids, start=1) if word(each) == words[n]]
        return at_token(name, layer, n, at[-1], two) if at else None

    patched, base = values(product((0, 1)), of)
    assert np.isnan(patched[:, 0]).all()
    assert not np.isnan(patched[0, 1:]).any()
    compare(found.measures[0], patched, base, most=False)


def test_row_values_in_replies_are_formatted_like_templates(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[Any] = [3.0, True, None, " w5 "]
    write_rows(data, [{**row, "said": own} for row, own in zip(records(), values, strict=True)])
    seen: set[str] = set()
    find = unpatched_runs.find_reply_tokens

    def recorded(place: Any, *rest: Any) -> Any:
        seen.add(place.text)
        return find(place, *rest)

    monkeypatch.setattr(unpatched_runs, "find_reply_tokens", recorded)
    measure = "measure entropy at said of reply token as raw"
    run_file(experiment("e", GENERATE, SET, measure=measure), data, "gpt2", "planned")
    assert seen == {"3", "true", "", "w5"}


def test_save_at_a_row_value_in_the_reply_has_the_reference_vectors(data: Path) -> None:
    own = [write("llama", text.ids, lambda written: ([], [])) for text in rows()]
    words = ["zebra", *(word(reply.ids[-1]) for reply in own[1:])]
    write_column(data, words)
    line = 'save resid_post layer 0 at said of reply token to "x.safetensors"'
    result, found = try_file(experiment("e", GENERATE, line, measure=""), data, "llama")
    assert result is not None, found
    tensors = load_file(data / "x.safetensors")
    about = [json.loads(each) for each in (data / "x.jsonl").read_text().splitlines()]
    assert sorted(data_row(each) for each in about) == list(range(1, len(rows())))
    for each, at, vector in zip(about, tensors["token"], tensors["resid_post.layer0"], strict=True):
        reply = own[data_row(each)]
        assert int(at) == reply.prompt - 1 + len(reply.ids)
        expected = reply.run["resid_post", 0][int(at), 0]
        torch.testing.assert_close(vector.double(), expected, atol=1e-3, rtol=1e-4)


def test_changed_row_values_are_not_read_from_the_store(data: Path) -> None:
    """With the same store, after a change of the column alone."""
    store = data / "store"
    measure = f"measure {TWO} at said of reply token as raw"
    text = experiment("e", GENERATE, SET, measure=measure)
    words = [word(reply.ids[0]) for reply in replies("gpt2", 0)]
    others = [word(reply.ids[-1]) for reply in replies("gpt2", 0)]
    found: list[Array] = []
    for own in (words, others):
        write_column(data, own)
        path = data / "file.mech"
        path.write_text(f'mech 1\nmodel m = local("m")\n{BLOCKS}\n{text}', encoding="utf-8")
        result = mechdsl.run(path, {"m": (bare("gpt2"), word_tokenizer())}, store=store)
        found.append(result["e"].measures[0].patched[0])
    assert np.nanmax(np.abs(found[0] - found[1])) > 0.01


def in_prompt(name: str, n: int) -> Callable[[int], Changes]:
    """`patch resid_post layer 1 at subject token` from `longer`, whose subject is longer."""
    text, source = rows()[n], rows("longer")[n]
    to, of = tokens(text, "subject token")[0], tokens(source, "subject token")[0]
    vector = plain(name, source)["resid_post", 1][of]
    return lambda written: ([Write("resid_post", 1, vector, to)], [])


def unseen(name: str, n: int) -> Callable[[int], Changes]:
    """`block attention layer * from last token to subject tokens`."""
    keys, prompt = tokens(rows()[n], "subject tokens"), len(rows()[n].ids)

    def act(written: int) -> Changes:
        queries = range(prompt - 1, prompt + written)
        return [], [Edge("block", layer, queries, keys) for layer in range(3)]

    return act


def steered(first: int, last: int, site: str = "attn_out") -> Callable[[str, int], Any]:
    return lambda name, n: set_everywhere(1, first, last, site=site)(len(rows()[n].ids))


RULES: dict[str, tuple[str, Callable[[str, int], Callable[[int], Changes]]]] = {
    "in the prompt": ("patch resid_post layer 1 at subject token", in_prompt),
    "blocked attention": ("block attention layers * from last token to subject tokens", unseen),
    "prefill": ("set attn_out layer 1 at last token to 0.6 during prefill", steered(0, 0)),
    "steps": ("set attn_out layer 1 at last token to 0.6 during step 1..2", steered(1, 2)),
    "one step": ("set attn_out layer 1 at last token to 0.6 during step 2", steered(2, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), EACH)
def test_measures_in_replies_repeat_rules_at_their_steps(data: Path, name: str, mode: str) -> None:
    text = "".join(
        experiment(
            f"e{n}", "from longer into clean", GENERATE, line,
            measure=f"measure {TWO} at each step as delta",
        )
        for n, (line, _) in enumerate(RULES.values())
    )  # fmt: skip
    found = run_file(text, data, name, mode)
    largest: list[float] = []
    for number, (_, act) in enumerate(RULES.values()):
        made = [write(name, text.ids, act(name, n)) for n, text in enumerate(rows())]

        def of(n: int, step: int, made: Sequence[Reply] = made) -> Any:
            at = made[n].at(step)
            if at is None:
                return None
            bare = behind(name, rows()[n].ids, made[n])
            return two(made[n].run.logits[at], n), two(bare.logits[at], n)

        steps = {cell.coords["step"] for cell in found[f"e{number}"].cells}
        assert steps == set(range(MOST))
        patched, base = values(product(range(MOST)), of)
        compare(found[f"e{number}"].measures[0], patched, base, large=-1, most=False)
        largest.append(float(np.nanmax(np.abs(patched - base))))
    assert sum(each > 0.1 for each in largest) > 2  # a reply may end before the step


# --- observations ---------------------------------------------------------------------------------


def norm(run: Run, text: Text, at: int) -> float:
    return float(run["resid_post", 2][at].norm())


def to_subject(run: Run, text: Text, at: int) -> float:
    return float(run["pattern", 2][at, 1, tokens(text, "subject tokens")].sum())


def to_first(run: Run, text: Text, at: int) -> float:
    return float(run["pattern", 2][at, 1, len(text.ids)])


def spread(run: Run, text: Text, at: int) -> float:
    weights = run["pattern", 2][at]
    return float(-(weights * weights.clamp_min(1e-30).log()).sum(-1).mean())


SEEN: dict[str, tuple[str, bool, Callable[[Run, Text, int], float]]] = {
    "norm": ("observe norm resid_post layer 2 at each reply token", True, norm),
    "attention": (
        "observe attention layer 2 head 1 from each reply token to subject tokens",
        True,
        to_subject,
    ),
    "of steps": (
        "observe attention layer 2 head 1 from each step to subject tokens",
        False,
        to_subject,
    ),
    "to the reply": (
        "observe attention layer 2 head 1 from each reply token to first token of reply",
        True,
        to_first,
    ),
    "entropy": ("observe entropy pattern layer 2 at each reply token", True, spread),
}
"""A line, whether it reads tokens (or steps), and its reference value at a token."""


@pytest.mark.parametrize(("name", "mode"), FEW)
def test_observations_in_replies_equal_the_reference(data: Path, name: str, mode: str) -> None:
    """With rules, and, for `delta`, without them after the same replies."""
    text = "".join(
        experiment(
            f"e{n}", GENERATE, SET, f"{line} as seen{n}", measure=f"measure seen{n} as delta"
        )
        for n, (line, _, _) in enumerate(SEEN.values())
    )
    found = run_file(text, data, name, mode)
    for number, (line, of_tokens, value) in enumerate(SEEN.values()):

        def of(n: int, layer: int, place: int, first: int = of_tokens, value: Any = value) -> Any:
            reply, own = replies(name, layer)[n], rows()[n]
            at = reply.at(place + first)
            if at is None or (not reply.ids and first):
                return None
            bare = behind(name, own.ids, reply)
            return value(reply.run, own, at), value(bare, own, at)

        own = found[f"e{number}"]
        assert own.axes == ("layer", "position")
        word = "reply" if of_tokens else "step"
        labels = [f"{word} {n + of_tokens}" for n in range(MOST)]
        assert [cell.coords["position"] for cell in own.cells] == labels * 2
        (measure,) = [each for each in own.measures if each.effect == "delta"]
        patched, base = values(product((0, 1), range(MOST)), of)
        unseen = name == "mistral" and "subject" in line  # outside the attention window
        compare(measure, patched, base, large=-1 if unseen else 0.01, most=False)


@pytest.mark.parametrize("mode", QUICK)
def test_observation_of_several_reply_tokens_is_their_mean(data: Path, mode: str) -> None:
    line = "observe norm resid_post layer 2 at reply tokens as seen"
    two_of = "observe norm resid_post layer 2 at reply tokens 2..3 as two"
    text = experiment("e", GENERATE, SET, line, two_of, measure="")
    found = run_file(text, data, "gpt2", mode)
    for key, (first, last) in {"e.seen": (1, MOST), "e.two": (2, 3)}.items():

        def of(n: int, layer: int, first: int = first, last: int = last) -> Any:
            reply, own = replies("gpt2", layer)[n], rows()[n]
            if len(reply.ids) < last < MOST:
                return None
            end = min(last, len(reply.ids))
            every = [norm(reply.run, own, len(own.ids) - 1 + n) for n in range(first, end + 1)]
            return float(np.mean(every)), 0.0

        patched, _ = values(product((0, 1)), of)
        compare(found[key].measures[0], patched, None)


@pytest.mark.parametrize(("name", "mode"), FEW)
def test_measures_in_replies_without_rules_equal_the_reference(
    data: Path, name: str, mode: str
) -> None:
    """The reply of the base run, measured and observed."""
    line = "observe norm resid_post layer 2 at each reply token as seen"
    text = experiment("e", GENERATE, measure=f"measure {TWO} at each step as raw")
    text += experiment("f", GENERATE, line, measure="")
    found = run_file(text, data, name, mode)
    own = [write(name, text.ids, lambda written: ([], [])) for text in rows()]

    def logits(n: int, step: int) -> Any:
        at = own[n].at(step)
        return None if at is None else (two(own[n].run.logits[at], n), 0.0)

    def seen(n: int, place: int) -> Any:
        at = own[n].at(place + 1)
        return None if at is None else (norm(own[n].run, rows()[n], at), 0.0)

    compare(found["e"].measures[0], values(product(range(MOST)), logits)[0], None)
    compare(found["f"].measures[0], values(product(range(MOST)), seen)[0], None)


def test_error_names_the_same_first_row_for_any_pass_size(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = experiment(
        "e", SET, "generate 2", measure="measure 1 / (correct - correct) at each step as raw"
    )
    said: list[list[str]] = []
    for tokens_of_a_pass in (unpatched_runs.REPLY_PASS_TOKENS, 1):
        monkeypatch.setattr(unpatched_runs, "REPLY_PASS_TOKENS", tokens_of_a_pass)
        _, found = try_file(text, data, "llama")
        said.append([each.message for each in found if each.code == "E0631"])
    assert said[0] == said[1] != []


# --- saves and errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), in_turn(NAMES, [*QUICK, "small passes"]))
def test_saved_vectors_in_replies_equal_the_reference(data: Path, name: str, mode: str) -> None:
    """Vectors of the final prompt token and of all generated tokens, with rows and texts."""
    line = 'save resid_post layer * at last token, each reply token to "x.safetensors"'
    result, found = try_file(experiment("e", GENERATE, line, measure=""), data, name, mode)
    assert result is not None, found
    tensors = load_file(data / "x.safetensors")
    about = [json.loads(each) for each in (data / "x.jsonl").read_text().splitlines()]
    own = [write(name, text.ids, lambda written: ([], [])) for text in rows()]
    places = {each["row"]: each for each in about}
    wanted: list[tuple[int, int]] = []
    for row, each in places.items():
        reply = own[data_row(each)]
        assert each["ids"] == [*rows()[data_row(each)].ids, *reply.ids]
        assert each["reply"] == " ".join(map(word, reply.ids))
        wanted += [(row, reply.prompt - 1 + n) for n in range(len(reply.ids) + 1)]
    assert wanted == list(zip(tensors["row"].tolist(), tensors["token"].tolist(), strict=True))
    for layer in range(3):
        vectors = tensors[f"resid_post.layer{layer}"]
        for row, at, vector in zip(tensors["row"], tensors["token"], vectors, strict=True):
            run = own[data_row(places[int(row)])].run
            torch.testing.assert_close(
                vector.double(), run["resid_post", layer][int(at), 0], atol=1e-3, rtol=1e-4
            )


@pytest.mark.parametrize("dtype", ["", " as float16", " as bfloat16"])
@pytest.mark.parametrize("mode", ["plain", "small passes"])
def test_save_where_no_reply_has_the_text_writes_an_empty_file(
    data: Path, mode: str, dtype: str
) -> None:
    lines = [
        f'save {site} at "zebra" of reply token to "{name}.safetensors"{dtype}'
        for name, site in (("x", "resid_post layer *"), ("y", "z layer 1 heads *"))
    ]
    result, found = try_file(experiment("e", GENERATE, *lines, measure=""), data, "llama", mode)
    assert result is not None, found
    for name in ("x", "y"):
        tensors = load_file(data / f"{name}.safetensors")
        assert {len(each) for each in tensors.values()} == {0}
        assert (data / f"{name}.jsonl").read_text() == ""
    assert [(each.vectors, each.rows) for each in result.saved] == [(0, 0)] * 2


@pytest.mark.parametrize("mode", ["plain", "small passes"])
def test_save_at_a_text_of_some_replies_has_those_rows(data: Path, mode: str) -> None:
    own = [write("llama", text.ids, lambda written: ([], [])) for text in rows()]
    words = [[word(i) for i in reply.ids] for reply in own]
    some = next(w for each in words for w in each if 0 < sum(w in r for r in words) < len(words))
    line = f'save resid_post layer 0 at "{some}" of reply token to "x.safetensors"'
    result, found = try_file(experiment("e", GENERATE, line, measure=""), data, "llama", mode)
    assert result is not None, found
    about = [json.loads(each) for each in (data / "x.jsonl").read_text().splitlines()]
    assert 0 < len(about) < len(rows())
    assert all(some in each["reply"].split() for each in about)
    assert len(load_file(data / "x.safetensors")["resid_post.layer0"]) == len(about)


def data_row(about: dict[str, Any]) -> int:
    """The number of a saved row in the data."""
    return next(n for n, text in enumerate(rows()) if about["ids"][: len(text.ids)] == text.ids)


REFUSED: dict[str, tuple[str, ...]] = {
    "no reply": (SET, "measure entropy at reply token 1 as raw"),
    "too late": (GENERATE, SET, "measure entropy at reply token 7 as raw"),
    "no value": (GENERATE, SET, "measure entropy at nobody of reply token as raw"),
    "no occurrence": (GENERATE, SET, "measure entropy at reply 2 token as raw"),
    "in a rule": (GENERATE, "set attn_out layer 1 at reply token to 0.6", "measure entropy as raw"),
    "joined": (GENERATE, SET, "measure entropy at {last token, reply token} as raw"),
    "recovery": (
        "from longer into clean",
        GENERATE,
        SET,
        "measure logit(answer) at reply token as recovery",
    ),
    "random": (GENERATE, SET, "against random(5)", "measure entropy at reply token as delta"),
    "activations": (GENERATE, SET, "measure cosine(L1.resid, clean) at reply token as raw"),
    "kept": (
        GENERATE,
        "set v layer 1 at subject token to 0.5 after prefill",
        "measure entropy at reply token as raw",
    ),
    "later tokens": (
        GENERATE,
        "observe received pattern layer 1 at subject token, reply token 1",
    ),
    "all rows": (GENERATE, "observe rank resid_post layer 1 at reply token as r"),
    "a pattern": (GENERATE, 'save pattern layer 1 at reply token to "x.safetensors"'),
}


@pytest.mark.parametrize("lines", REFUSED.values(), ids=REFUSED)
def test_invalid_reply_positions_are_errors(data: Path, lines: tuple[str, ...]) -> None:
    assert "E0545" in codes(experiment("e", *lines, measure=""), data)


def test_measure_at_several_reply_tokens_is_an_error(data: Path) -> None:
    lines = (GENERATE, SET, "measure entropy at reply tokens as raw")
    assert codes(experiment("e", *lines, measure=""), data) == ["E0612"]
