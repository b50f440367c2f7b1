"""Measures in sampled replies: each sample of each noise draw separately, then averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.vocab.metrics import Reply

from ..execute.support import PROMPTS, token
from ..quick import in_turn, some
from ..reference.forward import Run, Write, forward
from ..reference.noise import keyed_by_number, noise
from .models import double
from .support import QUICK, compare, experiment, records, rows, run_file, tokens, write_data
from .test_in_replies import entropy, kl

MOST, SAMPLES, DRAWS = 4, 3, 2
NOISED = f"corrupt noised {{ add gaussian(std: 0.7, samples: {DRAWS}) to embed at subject tokens }}"
BLOCKS = PROMPTS.replace("corrupt other", f"{NOISED}\n  corrupt other")
SET = "set attn_out layer 1 at last token to 0.6 during step 0..2"
LENS = "observe logit_lens resid_post layer 1 at each reply token as lens"
NORMS = {"gpt2": "transformer.ln_f", "llama": "model.norm"}


def forced(name: str, n: int, draw: int | None, reply: Reply, rule: bool) -> Run:
    """Run one pass over a prompt and its reply. draw: number of the noise draw, or None."""
    text, count = rows()[n], len(rows()[n].ids)
    writes: list[Write] = []
    for at in [] if draw is None else tokens(text, "subject tokens"):

        def added(now: torch.Tensor, at: int = at) -> torch.Tensor:
            return now + 0.7 * noise(n, draw or 0, at, now.shape[-1]).to(now)

        writes.append(Write("embed", None, added, at))
    if rule:
        steps = range(min(2, len(reply.ids)) + 1)
        writes += [
            Write("attn_out", 1, lambda now: torch.full_like(now, 0.6), count - 1 + step)
            for step in steps
        ]
    return forward(name, double(name), [*text.ids, *reply.ids], writes)


def lens(name: str, n: int, run: Run, at: int) -> float:
    """The logit difference (answer - wrong) of the final norm of a block's output."""
    model = double(name)
    with torch.no_grad():
        normed = model.get_submodule(NORMS[name])(run["resid_post", 1][at, 0])
        logits = model.get_output_embeddings()(normed)
    own = records()[n]
    return float(logits[token(own["a"])] - logits[token(own["b"])])


MEASURES = {
    "entropy": ("", "measure entropy at each step as delta", 0),
    "divergence": ("", "measure kl(clean) at each step as raw", 0),
    "observed": (LENS, "measure logit(answer) - logit(wrong) as delta", 1),
}
"""A line, a measure, and the first token of the reply that it reads (0: the prompt's last)."""
RUNS = ("clean", "noised")


@pytest.mark.parametrize("mode", some(QUICK, ["planned"]))
@pytest.mark.parametrize(("base", "name"), in_turn(RUNS, ["gpt2", "llama"], RUNS))
def test_each_sampled_reply_is_measured_separately(
    base: str, name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed_by_number(monkeypatch)
    write_data(tmp_path)
    lines = (
        f"from longer into {base}",
        f'generate {MOST} with temperature 3, samples {SAMPLES} until " w3"',
        SET,
    )
    text = "seed 0\n" + "".join(
        experiment(key, *lines, line, measure=measure)
        for key, (line, measure, _) in MEASURES.items()
    )
    text += experiment("lengths", *lines, measure="measure length as raw")
    found = run_file(text, tmp_path, name, mode, precise=True, blocks=BLOCKS)
    found = {key.partition(".")[0]: own for key, own in found.items()}
    replies = found["entropy"].replies.cells[0]
    draws = [None] if base == "clean" else list(range(DRAWS))
    assert {len(own) for own in replies.values()} == {len(draws) * SAMPLES}
    assert len({reply.ids for own in replies.values() for reply in own}) > len(rows())
    lengths = [np.mean([len(reply.ids) for reply in own]) for _, own in sorted(replies.items())]
    np.testing.assert_allclose(found["lengths"].measures[0].patched[0], lengths)
    assert len(set(lengths)) > 1
    for key, (_, _, first) in MEASURES.items():
        patched, unpatched = (np.full((MOST, len(rows())), np.nan) for _ in range(2))
        for place, n in np.ndindex(MOST, len(rows())):
            step, at = place + first, len(rows()[n].ids) - 1 + place + first
            of_draws: list[Any] = []
            for number, draw in enumerate(draws):
                own = replies[n][number * SAMPLES : (number + 1) * SAMPLES]
                there = [reply for reply in own if len(reply.ids) >= max(step, first)]
                pairs: list[tuple[float, float]] = []
                for reply in there:
                    run, bare = (forced(name, n, draw, reply, rule) for rule in (True, False))
                    if key == "entropy":
                        pairs.append((entropy(run.logits[at]), entropy(bare.logits[at])))
                    elif key == "divergence":
                        clean = forced(name, n, None, reply, False)
                        pairs.append((kl(clean.logits[at], run.logits[at]), 0.0))
                    else:
                        pairs.append((lens(name, n, run, at), lens(name, n, bare, at)))
                of_draws += [np.mean(pairs, axis=0)] if pairs else []
            if of_draws:
                patched[place, n], unpatched[place, n] = np.mean(of_draws, axis=0)
        (measure,) = [each for each in found[key].measures if each.effect in ("delta", "raw")][-1:]
        compare(measure, patched, None if key == "divergence" else unpatched, most=False)


@pytest.mark.parametrize("mode", some(QUICK, ["planned"]))
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_noise_draw_generates_a_separate_reply(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the run and in a cell, the reply has the most likely token at each step."""
    keyed_by_number(monkeypatch)
    write_data(tmp_path)
    lines = ("from longer into noised", f"generate {MOST}", SET)
    text = experiment("e", *lines, measure="measure length as raw")
    found = run_file(text, tmp_path, name, mode, precise=True, blocks=BLOCKS)["e"].replies
    seen: set[tuple[int, ...]] = set()
    for n in range(len(rows())):
        for rule, own in ((True, found.cells[0][n]), (False, found.runs["noised"][n])):
            for draw in range(DRAWS):
                ids: tuple[int, ...] = ()
                for _ in range(MOST):
                    run = forced(name, n, draw, Reply(ids, "", "length"), rule)
                    ids = (*ids, int(run.logits[-1].argmax()))
                assert own[draw].ids == ids
                seen.add(ids)
    assert len(seen) > 2 * len(rows())


def test_patch_during_generation_reads_the_same_noise_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step, the rule patches values of the same draw."""
    keyed_by_number(monkeypatch)
    write_data(tmp_path)
    lines = ("from noised into clean", f"generate {MOST}", "patch mlp_out layer 1 at last token")
    text = experiment("e", *lines, measure="measure length as raw")
    found = run_file(text, tmp_path, "gpt2", "planned", precise=True, blocks=BLOCKS)["e"].replies
    differ = 0
    for n, text in enumerate(rows()):
        for draw in range(DRAWS):
            source = forced("gpt2", n, draw, Reply((), "", "length"), rule=False)
            vector, ids = source["mlp_out", 1][-1, 0], list[int]()
            for step in range(MOST):
                places = range(len(text.ids) - 1, len(text.ids) + step)
                writes = [Write("mlp_out", 1, vector, at) for at in places]
                run = forward("gpt2", double("gpt2"), [*text.ids, *ids], writes)
                ids.append(int(run.logits[-1].argmax()))
            assert found.cells[0][n][draw].ids == tuple(ids)
        differ += found.cells[0][n][0] != found.cells[0][n][1]
    assert differ


TINY = "corrupt noised { add gaussian(std: 1e-9, samples: 2) to embed at subject tokens }"


def drawn(folder: Path, run: str = "clean", seed: int = 0) -> dict[str, list[tuple[int, ...]]]:
    """Replies of a run at a high temperature, by prompt."""
    lines = (f"from other into {run}", f"generate {MOST} with temperature 3", SET)
    text = f"seed {seed}\n" + experiment("e", *lines, measure="measure length as raw")
    blocks = PROMPTS.replace("corrupt other", f"{TINY}\n  corrupt other")
    found = run_file(text, folder, "gpt2", "planned", precise=True, blocks=blocks)["e"].replies
    return {found.prompts[n]: [r.ids for r in own] for n, own in found.runs[run].items()}


def test_sampled_replies_depend_on_seed_run_draw_and_row_content(tmp_path: Path) -> None:
    """They depend on the seed, the run, the noise draw (which has no other effect here) and the
    row's content, not on its order in the file."""
    write_data(tmp_path)
    clean, noised, other = drawn(tmp_path), drawn(tmp_path, "noised"), drawn(tmp_path, seed=1)
    for prompt, own in clean.items():
        assert len({*own, *noised[prompt], *other[prompt]}) == 4
    lines = (tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join(lines[:0:-1]), encoding="utf-8")
    fewer = drawn(tmp_path)
    assert len(fewer) == len(clean) - 1
    assert fewer.items() <= clean.items()
