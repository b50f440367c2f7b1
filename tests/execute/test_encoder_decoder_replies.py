"""Replies of encoder-decoders, against the bare model with the library's cache and hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mechdsl.execute.run.panel import execute
from mechdsl.forward.generation import replies
from mechdsl.loading.loader import adopt_model
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.results.assembly.collection import check_denominators

from .encoder_decoders import (
    WRITERS,
    Change,
    Place,
    Write,
    cases,
    copied,
    difference,
    explicit_attention,
    logits,
    model,
    place,
    read,
    read_attention,
    run,
    starts,
    text,
    tokenizer,
    weights_times,
    written,
    zeroed,
)
from .support import (
    DIFFERENCE,
    PROMPTS,
    ROWS,
    WITHOUT_PLAN,
    Array,
    Record,
    check_file,
    experiment,
    token,
    try_file,
    write_rows,
)

FAMILIES = cases(WRITERS)
TOKENS = 5
LENGTH = "measure length as raw"


def last(family: str) -> int:
    """The last of the decoder's first tokens."""
    return len(starts(family)) - 1


Newest = Sequence[tuple[Place, Change]]


@dataclass(frozen=True)
class Case:
    """A rule: its changes in the first pass, and at the newest token of later passes."""

    line: str
    first: Callable[[str, Record], Sequence[Write]] = lambda family, record: ()
    newest: Callable[[str, Record, int], Newest] = lambda family, record, step: ()
    edit: Callable[[str, Record, Any], None] | None = None


def from_other(site: str, layer: int, head: int | None = None) -> Callable[[str, Record], Any]:
    """The vectors of the other text at the encoder's last token."""

    def first(family: str, record: Record) -> list[Write]:
        base, source = text(record), text(record, "other")
        own = place(family, site, layer, head)
        return [copied(family, source, own, [base.last], [source.last])]

    return first


def at_last(
    site: str, layer: int, change: Change, head: int | None = None
) -> Callable[[str, Record], Any]:
    return lambda family, record: [(place(family, site, layer, head), [last(family)], change)]


def at_newest(
    site: str, layer: int, change: Change, head: int | None = None, steps: Sequence[int] = range(9)
) -> Callable[[str, Record, int], Newest]:
    def newest(family: str, record: Record, step: int) -> Newest:
        return [(place(family, site, layer, head), change)] if step in steps else ()

    return newest


def patched_newest(family: str, record: Record, step: int) -> Newest:
    """The vector of the other run's last token, at the newest token."""
    own = place(family, "mlp_out", 1)
    vector = read(family, text(record, "other"), own)[last(family)]
    return [(own, lambda _: vector[None])]


def patched_first(family: str, record: Record) -> list[Write]:
    own = place(family, "mlp_out", 1)
    return [copied(family, text(record, "other"), own, [last(family)], [last(family)])]


def without_items(family: str, record: Record, cache: Any) -> None:
    """Values of the encoder's items are 0 in a head of layer 1."""
    cache.cross_attention_cache.layers[1].values[0, 0, list(text(record).items)] = 0


def other_key(family: str, record: Record, cache: Any) -> None:
    """The key of the decoder's last first token is tripled in a head of layer 0."""
    cache.self_attention_cache.layers[0].keys[0, 1, last(family)] *= 3


def tripled(old: torch.Tensor) -> torch.Tensor:
    return 3 * old


CASES = {
    "encoder": Case(
        "patch resid_post encoder layer 0 at last token", from_other("resid_post encoder", 0)
    ),
    "encoder head": Case(
        "patch z encoder layer 1 head 0 at last token", from_other("z encoder", 1, 0)
    ),
    "value": Case("patch v cross layer 1 head 1 at last token", from_other("v cross", 1, 1)),
    "cross": Case(
        "ablate z cross layer 1 head 0 at last token with zero",
        at_last("z cross", 1, torch.zeros_like, 0),
        at_newest("z cross", 1, torch.zeros_like, 0),
    ),
    "cross prefill": Case(
        "ablate attn_out cross layer 0 at last token with zero during prefill",
        at_last("attn_out cross", 0, torch.zeros_like),
    ),
    "decoder": Case("patch mlp_out layer 1 at last token", patched_first, patched_newest),
    "range": Case(
        "scale mlp_out layer 1 at last token by 3 during step 1..2",
        newest=at_newest("mlp_out", 1, tripled, steps=(1, 2)),
    ),
    "late": Case(
        "scale z layer 2 head 1 at last token by 3 during step 3",
        newest=at_newest("z", 2, tripled, 1, steps=(3,)),
    ),
    "key": Case(
        "scale k layer 0 head 1 at last token by 3",
        at_last("k", 0, tripled, 1),
        at_newest("k", 0, tripled, 1),
    ),
    "cache": Case(
        "scale v cross layer 1 head 0 at item tokens by 0 after prefill", edit=without_items
    ),
    "own cache": Case("scale k layer 0 head 1 at last token by 3 after prefill", edit=other_key),
}


def record_logits(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Array]]:
    """Collect the logits of all states by step, while a test runs."""
    found: dict[int, list[Array]] = {}
    choose = replies.choose_next_tokens

    def kept(given: torch.Tensor, *others: Any) -> Any:
        found.setdefault(others[-1], []).extend(given.double().numpy())
        return choose(given, *others)

    monkeypatch.setattr(replies, "choose_next_tokens", kept)
    return found


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Array]]:
    """Step → the logits of all states that were computed in it."""
    return record_logits(monkeypatch)


def check(
    of_prompt: Mapping[int, Any],
    expected: Sequence[tuple[list[int], list[Array]]],
    steps: dict[int, list[Array]],
) -> None:
    """The tokens are equal, and so are the logits of each step."""
    assert [list(of_prompt[n][0].ids) for n in sorted(of_prompt)] == [own for own, _ in expected]
    for _, each in expected:
        for step, wanted in enumerate(each):
            off = min(np.abs(own - wanted).max() for own in steps[step])
            assert off < 2e-4


@pytest.mark.parametrize("options", [RunOptions(), WITHOUT_PLAN], ids=["planned", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replies_under_rules_equal_those_of_the_library(
    family: str, options: RunOptions, tmp_path: Path, steps: dict[int, list[Array]]
) -> None:
    lines = ""
    for number, case in enumerate(CASES.values()):
        source = "from other into clean" if case.line.startswith("patch") else ""
        body = ("prompts p", source, f"generate {TOKENS}", case.line, LENGTH)
        lines += experiment(f"e{number}", *body)
    results = run(family, lines, tmp_path, options)
    clean = [written(family, text(record), count=TOKENS) for record in ROWS]
    check(results["e0"].replies.runs["clean"], clean, steps)
    for number, case in enumerate(CASES.values()):
        acted = [acting(family, case, record) for record in ROWS]
        check(results[f"e{number}"].replies.cells[0], acted, steps)
        changes = [
            np.abs(now - before).max()
            for (_, own), (_, base) in zip(acted, clean, strict=True)
            for now, before in zip(own, base, strict=False)
        ]
        assert max(changes) > 0.1


def acting(family: str, case: Case, record: Record) -> tuple[list[int], list[Array]]:
    """The reply under a rule, with the library's cache."""

    def newest(step: int) -> Newest:
        return case.newest(family, record, step)

    def edit(cache: Any) -> None:
        if case.edit is not None:
            case.edit(family, record, cache)

    return written(family, text(record), case.first(family, record), newest, edit, TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_replies_equal_those_of_generate(family: str) -> None:
    for record in ROWS:
        given = {"max_new_tokens": TOKENS + last(family), "do_sample": False, "num_beams": 1}
        ids = torch.tensor([text(record).ids])
        whole = model(family).generate(ids, use_cache=False, forced_eos_token_id=None, **given)
        reply = whole[0, len(starts(family)) :].tolist()
        end = model(family).config.eos_token_id
        reply = reply[: reply.index(end)] if end in reply else reply
        assert written(family, text(record), count=TOKENS)[0] == reply


Edges = Callable[[Record, int], list[tuple[int, int, int]]]

EDGES: dict[str, tuple[str, str, int, float, Edges]] = {
    "cross": (
        "block attention cross layer 1 head 0 from last token to subject tokens",
        "cross",
        1,
        0.0,
        lambda record, at: [(0, at, key) for key in text(record).subject],
    ),
    "cross later": (
        "reweight attention cross layer 0 head 1 from last token to item tokens by 4 "
        "during step 2..4",
        "cross",
        0,
        4.0,
        lambda record, at: [(1, at, key) for key in text(record).items],
    ),
    "encoder": (
        "block attention encoder layer 0 head 1 from last token to item tokens",
        "encoder",
        0,
        0.0,
        lambda record, at: [(1, text(record).last, key) for key in text(record).items],
    ),
    "decoder": (
        "block attention layer 0 head 0 from last token to first token during step 1..4",
        "",
        0,
        0.0,
        lambda record, at: [(0, at, 0)],
    ),
}


def with_edges(family: str, record: Record, name: str) -> tuple[list[int], list[Array]]:
    """A reply, a full pass without a cache for each token."""
    stack, layer, factor, edges = EDGES[name][1:]
    from_step = {"cross later": 2, "decoder": 1}.get(name, 0)
    reply, found = list[int](), list[Array]()
    for step in range(TOKENS):
        queries = range(last(family) + from_step, last(family) + step + 1)
        queries = range(1) if stack == "encoder" else queries
        own = [edge for at in queries for edge in edges(record, at)]
        with weights_times(family, stack, layer, own, factor):
            found.append(logits(family, text(record), (), reply)[-1])
        reply.append(int(found[-1].argmax()))
        if reply[-1] == model(family).config.eos_token_id:
            return reply[:-1], found
    return reply, found


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_under_changed_attention_equal_written_out_attention(
    family: str, tmp_path: Path, steps: dict[int, list[Array]]
) -> None:
    lines = "".join(
        experiment(f"e{number}", "prompts p", f"generate {TOKENS}", line, LENGTH)
        for number, (line, *_) in enumerate(EDGES.values())
    )
    results = run(family, lines, tmp_path)
    for number, name in enumerate(EDGES):
        expected = [with_edges(family, record, name) for record in ROWS]
        check(results[f"e{number}"].replies.cells[0], expected, steps)


PREFILL = ("pattern encoder", "scores cross", "pattern")
"""Sites whose vectors over keys are written in the pass over the prompt."""


def with_vectors(family: str, record: Record, site: str) -> tuple[list[int], list[Array]]:
    """A reply with vectors of the other run in all heads of layer 1, a full pass for each token."""
    component, _, stack = site.partition(" ")
    base, other = text(record), text(record, "other")
    query, source = (each.last if stack == "encoder" else last(family) for each in (base, other))
    vectors = read_attention(family, other, component, stack, 1)[:, source]

    def change(values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        values[:, query, : vectors.shape[1]] = vectors
        return values

    reply, found = list[int](), list[Array]()
    changes = {"scored" if component == "scores" else "weighed": change}
    for _ in range(TOKENS):
        with explicit_attention(family, stack, 1, **changes):
            found.append(logits(family, base, (), reply)[-1])
        reply.append(int(found[-1].argmax()))
        if reply[-1] == model(family).config.eos_token_id:
            return reply[:-1], found
    return reply, found


@pytest.mark.parametrize("family", [f"{each} writing" for each in ("t5", "bart", "t5gemma")])
def test_replies_after_written_scores_equal_explicit_attention(
    family: str, tmp_path: Path, steps: dict[int, list[Array]]
) -> None:
    given = "prompts p", "from other into clean", f"generate {TOKENS}"
    lines = "".join(
        experiment(
            f"e{number}",
            *given,
            f"patch {site} layer 1 heads * at last token during prefill",
            LENGTH,
        )
        for number, site in enumerate(PREFILL)
    )
    results = run(family, lines, tmp_path)
    for number, site in enumerate(PREFILL):
        expected = [with_vectors(family, record, site) for record in ROWS]
        check(results[f"e{number}"].replies.cells[0], expected, steps)


def test_conventions_state_the_unused_settings(tmp_path: Path) -> None:
    module = model("t5 writing")
    lines = experiment("e", "prompts p", f"generate {TOKENS}", LENGTH)
    said = dict(run("t5 writing", lines, tmp_path)["e"].conventions)
    assert "generation config" not in said["generate"]
    assert said["kept keys"].endswith("the encoder runs once")
    module.generation_config.num_beams = 4
    try:
        said = dict(run("t5 writing", lines, tmp_path)["e"].conventions)
    finally:
        module.generation_config.num_beams = 1
    assert "`num_beams` of the model's generation config isn't used" in said["generate"]


def words(ids: Sequence[int]) -> str:
    return str(tokenizer().decode(list(ids)))


@pytest.mark.parametrize("family", FAMILIES)
def test_measures_of_replies_equal_the_text_of_the_library(family: str, tmp_path: Path) -> None:
    own = [written(family, text(record), count=TOKENS)[0] for record in ROWS]
    most = max(own, key=len)
    part = words(most[:1])
    prompts = PROMPTS.replace('" {a}"', f'"{words(most)}"')
    lines = experiment(
        "e",
        "prompts p",
        f"generate {TOKENS}",
        f'measure contains("{part}") as raw',
        "measure exact_match as raw",
        LENGTH,
    )
    measures = run(family, lines, tmp_path, prompts=prompts)["e"].measures
    np.testing.assert_array_equal(measures[0].base[0], [part in words(each) for each in own])
    np.testing.assert_array_equal(measures[1].base[0], [each == most for each in own])
    np.testing.assert_array_equal(measures[2].base[0], [len(each) for each in own])


def entropy(scores: Array) -> float:
    found = torch.tensor(scores).log_softmax(-1)
    return float(-(found.exp() * found).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_measures_at_steps_equal_the_logits_of_generation(family: str, tmp_path: Path) -> None:
    case = CASES["cross"]
    lines = experiment(
        "e", "prompts p", f"generate {TOKENS}", case.line, "measure entropy at each step as raw"
    )
    lines += experiment(
        "l", "prompts p", f"generate {TOKENS}", case.line, "measure loss at each reply token as raw"
    )
    results = run(family, lines, tmp_path)
    for column, record in enumerate(ROWS):
        reply, found = acting(family, case, record)
        steps = results["e"].measures[0].patched[:, column]
        wanted = [entropy(each) for each in found[: len(reply) or 1]]
        np.testing.assert_allclose(steps[: len(wanted)], wanted, atol=2e-4)
        losses = [
            float(-torch.tensor(each).log_softmax(-1)[chosen])
            for each, chosen in zip(found, reply, strict=False)
        ]
        own = results["l"].measures[0].patched[:, column]
        np.testing.assert_allclose(own[: len(reply)], losses, atol=2e-4)
        assert np.isnan(own[len(reply) :]).all()


def present(values: Array) -> Array:
    """The values of rows whose reply has the position."""
    return values[np.isfinite(values)]


@pytest.mark.parametrize(
    "family", cases(each for each in WRITERS if each != "t5gemma writing")
)  # small effects
def test_experiments_on_replies_of_others_equal_hooks(family: str, tmp_path: Path) -> None:
    """The decoder reads its first tokens, then the reply of the experiment `w`, in all runs."""
    again, site = "prompts p with replies of w", "resid_post encoder"
    ablated = CASES["cross prefill"]
    lines = (
        experiment("w", "prompts p", f"generate {TOKENS}", ablated.line, LENGTH)
        + experiment(
            "q", again, "from other into clean", f"patch {site} layer 0 at last token", DIFFERENCE
        )
        + experiment("own", again, "scale mlp_out layer 1 at reply token 1 by 3", DIFFERENCE)
        + experiment("word", again, f'ablate {site} layer 1 at "w40" token with zero', DIFFERENCE)
        + experiment("l", again, "measure loss at reply token 1 as raw")
        + experiment(
            "z",
            again,
            "observe attention cross layer 1 head 0 from reply token 1 to subject tokens",
        )
    )
    results = run(family, lines, tmp_path)
    replies = [acting(family, ablated, record)[0] for record in ROWS]
    found: dict[str, list[float]] = {name: [] for name in ("q", "own", "word", "l", "z")}
    for record, reply in zip(ROWS, replies, strict=True):
        base = text(record)
        newest = last(family) + 1
        at_word = base.ids.index(token("w40"))
        writes = {
            "q": from_other(site, 0)(family, record),
            "own": [(place(family, "mlp_out", 1), [newest], tripled)],
            "word": [zeroed(place(family, f"{site}", 1), [at_word])],
        }
        clean = logits(family, base, (), reply)
        for name, each in writes.items():
            if name == "own" and not reply:
                continue
            changed = difference(logits(family, base, each, reply), record)
            found[name].append(changed - difference(clean, record))
        if not reply:
            continue
        scores = torch.tensor(clean[last(family)]).log_softmax(-1)
        found["l"].append(float(-scores[reply[0]]))
        weights: list[torch.Tensor] = []
        with weights_times(family, "cross", 1, seen=weights):
            logits(family, base, (), reply)
        found["z"].append(float(weights[0][0, newest, list(base.subject)].sum()))
    for name in ("q", "own", "word"):
        measure = results[name].measures[0]
        own = (measure.patched - measure.base)[0]
        np.testing.assert_allclose(present(own), found[name], atol=5e-4)
        assert np.abs(found[name]).max() > 0.01
    np.testing.assert_allclose(present(results["l"].measures[0].patched[0]), found["l"], atol=2e-4)
    np.testing.assert_allclose(present(results["z"].measures[0].patched[0]), found["z"], atol=1e-5)
    assert "read after the reply" in dict(results["q"].conventions)["answer"]


@pytest.mark.parametrize("family", ["t5 writing", "bart writing"])
def test_samples_and_swept_steps_equal_hooks(family: str, tmp_path: Path) -> None:
    sampled = experiment(
        "s",
        "prompts p",
        f"generate {TOKENS} with temperature 0.01, samples 2",
        CASES["cross"].line,
        LENGTH,
    )
    swept = experiment(
        "e",
        "prompts p",
        f"generate {TOKENS}",
        "for s in 1..3 { scale mlp_out layer 1 at last token by 3 during step s }",
        LENGTH,
    )
    results = run(family, "seed 3\n" + sampled + swept, tmp_path)
    case = CASES["cross"]
    for n, record in enumerate(ROWS):
        reply, _ = acting(family, case, record)
        own = results["s"].replies.cells[0][n]
        assert [list(each.ids) for each in own] == [reply, reply]
        for number, step in enumerate((1, 2, 3)):
            swept_step = Case("", newest=at_newest("mlp_out", 1, tripled, steps=(step,)))
            reply, _ = acting(family, swept_step, record)
            assert list(results["e"].replies.cells[number][n][0].ids) == reply


ERRORS = {
    "patch z encoder layer 0 head 0 at last token during step 2\n  generate 4": "E0207",
    "scale z cross layer 0 head 0 at last token by 0 after prefill\n  generate 4": "E0207",
    "scale v cross layer 0 head 0 at last token by 0 after prefill\n  generate 1": "E0207",
    "block attention cross layer 0 from last token to reply token 1\n  generate 4": "E0545",
    "patch resid_post encoder layer 1 at reply token 1": "E0545",
    "scale z layer 0 head 0 at last token by 0\n  generate 60": "E0207",
}


@pytest.mark.parametrize(("line", "code"), ERRORS.items())
def test_invalid_line_reports_the_code_before_anything_runs(
    line: str, code: str, tmp_path: Path
) -> None:
    lines = experiment(
        "e", "prompts p", "from other into clean", line, "measure prob(answer) as raw"
    )
    _, found = try_file(lines, tmp_path, model("bart writing"), None, tokenizer=tokenizer())
    assert [each.code for each in found if each.severity == "error"] == [code]


@pytest.mark.parametrize("family", ["t5 writing", "bart writing"])
def test_planned_cost_is_near_the_counted_products(family: str, tmp_path: Path) -> None:
    loaded, _ = adopt_model("m", model(family), tokenizer())
    assert loaded is not None
    write_rows(tmp_path)
    rule = "ablate z cross layer 1 head 0 at last token with zero"
    for lines in ((rule, DIFFERENCE), (f"generate {TOKENS}", rule, LENGTH)):
        checked = check_file(experiment("e", "prompts p", *lines), tmp_path, loaded)
        plan = make_plan(checked.experiments)
        with FlopCounterMode(display=False) as counter:
            execute(plan, {"m": loaded}, None, check=check_denominators)
        planned = plan_cost(plan).planned.multiply_adds
        assert 0.7 < planned / (counter.get_total_flops() / 2) < 1.4  # of padded prompts
