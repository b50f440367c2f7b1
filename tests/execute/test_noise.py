"""Noise on embeddings: its runs, its size, and independence of batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import mechdsl.execute.unpatched_batch
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.pipeline.options import RunOptions
from mechdsl.resolve.observations import ObservedTokens, TokenVectors
from mechdsl.rules.observations.rows import Clusters

from ..quick import in_turn
from ..reference.forward import Write, forward
from ..reference.noise import keyed_by_number
from ..reference.points import Point, copied
from .support import (
    DIFFERENCE,
    MODES,
    ROWS,
    agree,
    bare,
    difference,
    experiment,
    prompt,
    run_file,
    unpatched,
    write_rows,
)

FAMILY = "gpt2"
DRAWS = 3
PROMPTS = """
prompts p {
  rows "data.jsonl"
  xs = list(item, from: words, sep: " ")
  template "{xs} w40 {subject} w41 {cue} w42"
  answer " {a}"
  wrong " {b}"
  corrupt noised { add gaussian(std: 3 sd, samples: 3) to embed at subject tokens }
  corrupt fixed { add gaussian(std: 0.5, samples: 3) to embed at subject tokens }
}
"""
RESTORE = "patch resid_post layer * at subject token, last token"
TEXT = experiment("e", "prompts p", "from clean into noised", RESTORE, DIFFERENCE)


@dataclass
class Seen:
    """The noise that a run added: (row of the data, draw) → positions and vectors."""

    noise: dict[tuple[int, int], list[tuple[int, Tensor]]] = field(default_factory=dict)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Record the added noise, which is otherwise unknown."""
    found, original = Seen(), mechdsl.execute.unpatched_batch.build_noise_writes

    keyed_by_number(monkeypatch)

    def spy(model: Any, noise: Any, lanes: Any, keys: Any, seed: int) -> list[Any]:
        writes = original(model, noise, lanes, keys, seed)
        draws = 1 if noise is None else noise.samples
        own: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for write in writes:
            columns = zip(write.rows.tolist(), write.positions.tolist(), write.values, strict=True)
            for lane, position, vector in columns:
                key = (int(keys[lanes[lane]]), lane % draws)
                own.setdefault(key, []).append((position, vector.float()))
        found.noise.update(own)
        return writes

    monkeypatch.setattr(mechdsl.execute.unpatched_batch, "build_noise_writes", spy)
    return found


def noised(seen: Seen, n: int, draw: int) -> list[Write]:
    """The clean embeddings plus the noise."""
    clean = unpatched(FAMILY, prompt(ROWS[n]))[1]["embed", None]
    return [Write("embed", None, clean[at, 0] + noise, at) for at, noise in seen.noise[n, draw]]


def over_draws(seen: Seen, n: int, writes: Sequence[Write] = ()) -> float:
    """The metric of a row, averaged over the draws."""
    ids, values = prompt(ROWS[n]).ids, []
    for draw in range(DRAWS):
        changed = [*noised(seen, n, draw), *writes]
        values.append(difference(forward(FAMILY, bare(FAMILY), ids, changed).logits, ROWS[n]))
    return float(np.mean(values))


def sd_by_hand() -> float:
    """The standard deviation of all numbers in the embeddings of all subject tokens."""
    table = bare(FAMILY).transformer.wte.weight.detach()
    ids = [p.ids[i] for p in map(prompt, ROWS) for i in p.subject]
    return float(table[ids].double().flatten().std())


@pytest.mark.parametrize("mode", list(MODES))
def test_restoring_in_a_noised_run_equals_the_reference(
    folder: Path, seen: Seen, mode: str
) -> None:
    found = run_file(TEXT, folder, bare(FAMILY), MODES[mode], prompts=PROMPTS)["e"]
    base = np.array([over_draws(seen, n) for n in range(len(ROWS))])
    expected = []
    for layer in range(3):
        for place in ("subject", "last"):
            row = []
            for n, record in enumerate(ROWS):
                clean = prompt(record)
                at = [clean.subject[-1] if place == "subject" else clean.last]
                point = [Point("resid_post", layer)]
                row.append(over_draws(seen, n, copied(point, unpatched(FAMILY, clean)[1], at, at)))
            expected.append(row)
    agree(found.measures[0], np.array(expected), base)
    source = found.measures[0].source
    assert source is not None
    clean_values = [difference(unpatched(FAMILY, prompt(r))[0], r) for r in ROWS]
    np.testing.assert_allclose(source[0], clean_values, atol=1e-4)


@pytest.mark.parametrize(("mode", "site"), in_turn(list(MODES), ["embed", "attn_out"]))
def test_rows_that_start_at_the_embedding_have_noise(
    folder: Path, seen: Seen, mode: str, site: str
) -> None:
    """A patched clean embedding has no noise; other positions keep the noise."""
    layer = None if site == "embed" else 0
    written = "embed" if layer is None else "attn_out layer 0"
    rule = f"patch {written} at subject token"
    text = experiment("e", "prompts p", "from clean into noised", rule, DIFFERENCE)
    found = run_file(text, folder, bare(FAMILY), MODES[mode], prompts=PROMPTS)["e"]
    base = np.array([over_draws(seen, n) for n in range(len(ROWS))])
    expected = []
    for n, record in enumerate(ROWS):
        clean = prompt(record)
        at = [clean.subject[-1]]
        edits = copied([Point(site, layer)], unpatched(FAMILY, clean)[1], at, at)
        # The later of two changes at a position applies.
        expected.append(over_draws(seen, n, edits))
    agree(found.measures[0], np.array([expected]), base)


def test_noise_is_added_at_all_subject_tokens_and_nowhere_else(folder: Path, seen: Seen) -> None:
    run_file(TEXT, folder, bare(FAMILY), prompts=PROMPTS)
    assert set(seen.noise) == {(n, d) for n in range(len(ROWS)) for d in range(DRAWS)}
    for (n, _), added in seen.noise.items():
        assert tuple(at for at, _ in added) == prompt(ROWS[n]).subject
    vectors = torch.stack([v for added in seen.noise.values() for _, v in added])
    assert len(vectors.unique(dim=0)) == len(vectors), "every row, draw and token has its own"


def test_three_sd_are_three_standard_deviations_of_the_subjects_embeddings(
    folder: Path, seen: Seen
) -> None:
    found = run_file(TEXT, folder, bare(FAMILY), prompts=PROMPTS)["e"]
    vectors = torch.stack([v for added in seen.noise.values() for _, v in added])
    wanted = 3 * sd_by_hand()
    assert float(vectors.std()) == pytest.approx(wanted, rel=0.1)
    assert f"{wanted:.4g}" in found.conventions["noise of noised"]


def test_noise_std_without_sd_is_in_units_of_the_activation(folder: Path, seen: Seen) -> None:
    text = experiment("e", "prompts p", "from clean into fixed", RESTORE, DIFFERENCE)
    run_file(text, folder, bare(FAMILY), prompts=PROMPTS)
    vectors = torch.stack([v for added in seen.noise.values() for _, v in added])
    assert float(vectors.std()) == pytest.approx(0.5, rel=0.1)


def as_lists(seen: Seen) -> dict[tuple[int, int], list[tuple[int, list[float]]]]:
    return {
        key: [(at, vector.tolist()) for at, vector in sorted(added, key=lambda pair: pair[0])]
        for key, added in sorted(seen.noise.items())
    }


def test_noise_does_not_depend_on_the_batch(folder: Path, seen: Seen) -> None:
    outcomes = []
    for tokens in (1, 30, 4096):
        seen.noise.clear()
        options = RunOptions(execution=ExecutionOptions(prompt_tokens=tokens, pass_tokens=tokens))
        found = run_file(TEXT, folder, bare(FAMILY), options, prompts=PROMPTS)["e"]
        outcomes.append((as_lists(seen), found.measures[0].patched, found.measures[0].base))
    for noise, patched, base in outcomes[1:]:
        assert noise == outcomes[0][0]
        np.testing.assert_allclose(patched, outcomes[0][1], atol=1e-4)
        np.testing.assert_allclose(base, outcomes[0][2], atol=1e-4)


def test_noise_does_not_depend_on_the_limit(folder: Path, seen: Seen) -> None:
    run_file(TEXT, folder, bare(FAMILY), prompts=PROMPTS)
    whole = as_lists(seen)
    seen.noise.clear()
    limited = TEXT.replace("prompts p", "prompts p limit 2")
    run_file(limited, folder, bare(FAMILY), prompts=PROMPTS)
    part = as_lists(seen)
    assert {row for row, _ in part} < {row for row, _ in whole}
    # One sd is taken over all rows before the limit.
    assert part == {key: whole[key] for key in part}


def test_clusters_are_fitted_on_means_over_noise_draws(
    folder: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token has the concatenated vectors of two layers."""
    given: list[TokenVectors] = []

    def told(clusters: object, tokens: ObservedTokens, seed: int) -> Sequence[NDArray[np.float64]]:
        given.append(tokens.own)
        return [np.zeros((2, len(tokens.own.row)))]

    monkeypatch.setattr(Clusters, "per_token", told)
    rule = "observe clusters(2) resid_post layers 0..1 at subject tokens as kind"
    text = experiment("e", "prompts p", "from clean into fixed", rule)
    run_file(text, folder, bare(FAMILY), prompts=PROMPTS)
    [own] = given
    sizes = [len(each.subject) for each in map(prompt, ROWS)]
    assert len({*sizes}) == len(sizes)  # sizes identify rows
    for row in range(len(ROWS)):
        found, draws = own.vectors[own.row == row], list[Tensor]()
        number = sizes.index(len(found))
        each = prompt(ROWS[number])
        for draw in range(DRAWS):
            made = forward(FAMILY, bare(FAMILY), each.ids, noised(seen, number, draw)).seen
            layers = [made["resid_post", layer][[*each.subject]].flatten(1) for layer in (0, 1)]
            draws.append(torch.cat(layers, 1))
        np.testing.assert_allclose(found, torch.stack(draws).mean(0).numpy(), atol=1e-4)


def test_another_seed_gives_other_noise(folder: Path, seen: Seen) -> None:
    run_file(TEXT, folder, bare(FAMILY), prompts=PROMPTS)
    first = as_lists(seen)
    seen.noise.clear()
    run_file("seed 1\n" + TEXT, folder, bare(FAMILY), prompts=PROMPTS)
    assert set(as_lists(seen)) == set(first)
    assert all(as_lists(seen)[key] != first[key] for key in first)


def test_patching_from_a_noised_run_averages_over_draws(folder: Path, seen: Seen) -> None:
    """`from noised into clean`: each draw gives one patched run, and the metric is averaged."""
    text = experiment("e", "prompts p", "from noised into clean", RESTORE, DIFFERENCE)
    found = run_file(text, folder, bare(FAMILY), prompts=PROMPTS)["e"]
    base = np.array([difference(unpatched(FAMILY, prompt(r))[0], r) for r in ROWS])
    expected = []
    for layer in range(3):
        for place in ("subject", "last"):
            row = []
            for n, record in enumerate(ROWS):
                clean, values = prompt(record), []
                at = [clean.subject[-1] if place == "subject" else clean.last]
                for draw in range(DRAWS):
                    there = forward(FAMILY, bare(FAMILY), clean.ids, noised(seen, n, draw)).seen
                    edits = copied([Point("resid_post", layer)], there, at, at)
                    logits = forward(FAMILY, bare(FAMILY), clean.ids, edits).logits
                    values.append(difference(logits, record))
                row.append(np.mean(values))
            expected.append(row)
    agree(found.measures[0], np.array(expected), base)


@pytest.mark.parametrize("mode", ["plain", "planned"])
def test_mean_of_a_noised_run_is_over_all_draws(folder: Path, seen: Seen, mode: str) -> None:
    """One mean of all rows and draws, written in a single run."""
    rule = "ablate resid_post layer 0..1 at {subject token, last token} with mean of fixed"
    text = experiment("e", "prompts p", rule, DIFFERENCE)
    found = run_file(text, folder, bare(FAMILY), MODES[mode], prompts=PROMPTS)["e"]
    places = [[p.subject[-1], p.last] for p in map(prompt, ROWS)]
    every = [
        (n, forward(FAMILY, bare(FAMILY), prompt(ROWS[n]).ids, noised(seen, n, draw)).seen)
        for n in range(len(ROWS))
        for draw in range(DRAWS)
    ]
    expected = []
    for layer in (0, 1):
        site = ("resid_post", layer)
        mean = {site: torch.stack([sites[site][places[n]] for n, sites in every]).mean(0)}
        edits = [copied([Point(*site)], mean, [0, 1], at) for at in places]
        expected.append(
            [
                difference(forward(FAMILY, bare(FAMILY), prompt(r).ids, edit).logits, r)
                for r, edit in zip(ROWS, edits, strict=True)
            ]
        )
    base = np.array([difference(unpatched(FAMILY, prompt(r))[0], r) for r in ROWS])
    agree(found.measures[0], np.array(expected), base)


def test_noise_sd_does_not_depend_on_row_order(folder: Path, seen: Seen) -> None:
    first = run_file(TEXT, folder, bare(FAMILY), prompts=PROMPTS)["e"]
    write_rows(folder, ROWS[::-1])
    second = run_file(TEXT, folder, bare(FAMILY), prompts=PROMPTS)["e"]
    assert first.conventions["noise of noised"] == second.conventions["noise of noised"]


def test_patch_with_a_noised_run_averages_over_draws(folder: Path) -> None:
    """`patch … with noised` averages over all draws, as `from noised into clean` does."""
    rule = "patch resid_post layer * at subject token"
    text = experiment("a", "prompts p", f"{rule} with noised", DIFFERENCE) + experiment(
        "b", "prompts p", "from noised into clean", rule, DIFFERENCE
    )
    found = run_file(text, folder, bare(FAMILY), MODES["planned"], prompts=PROMPTS)
    own, both = (found[name].measures[0].patched for name in ("a", "b"))
    np.testing.assert_allclose(own, both, atol=1e-5)
    one = run_file(
        experiment("one", "prompts p", f"{rule} with noised", DIFFERENCE),
        folder,
        bare(FAMILY),
        MODES["planned"],
        prompts=PROMPTS.replace("samples: 3", "samples: 1"),
    )["one"]
    assert np.abs(own - one.measures[0].patched).max() > 0.01


def test_experiments_with_and_without_noise_equal_separate_runs(folder: Path) -> None:
    """Both start from `clean`; one patches with each draw, the other once."""
    rule = "patch resid_post layer 0..1 at subject token"
    each = {
        name: experiment(name, "prompts p", f"from {source} into clean", rule, DIFFERENCE)
        for name, source in (("plain", "other"), ("noisy", "noised"))
    }
    prompts = PROMPTS.replace(
        "  corrupt noised", "  corrupt other { subject = alt }\n  corrupt noised"
    )
    alone = {
        name: run_file(text, folder, bare(FAMILY), prompts=prompts)[name].measures[0].patched
        for name, text in each.items()
    }
    for text in ("".join(each.values()), "".join(list(each.values())[::-1])):
        found = run_file(text, folder, bare(FAMILY), prompts=prompts)
        for name, values in alone.items():
            np.testing.assert_allclose(found[name].measures[0].patched, values, atol=1e-5)


def test_progress_counts_draws_and_ends_at_the_total(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    options = RunOptions(execution=ExecutionOptions(on_progress=lambda *call: calls.append(call)))
    found = run_file(TEXT, folder, bare(FAMILY), options, prompts=PROMPTS)["e"]
    cells, rows = found.measures[0].patched.shape
    assert {total for _, total in calls} == {cells * rows * DRAWS}
    assert calls[-1][0] == cells * rows * DRAWS
