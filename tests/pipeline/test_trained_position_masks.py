"""Groups of positions that a file declares with `fit(mask(…))`.

Loss and gradient are compared with plain hooks on the bare model in float64, one unpadded prompt at
a time. Further tests: planted positions, use in rules, keys, and errors.
"""

from __future__ import annotations

import copy
import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechdsl
from mechdsl.execute.mask_training import PositionMaskRows
from mechdsl.fits.reports import MaskReport
from mechdsl.resolve.types import PositionChoice, TrainedMask

from ..execute.support import unchanged, word_tokenizer
from ..models import families
from ..quick import in_turn, some
from ..reference.forward import Write, side_by_side
from ..rules.models import double
from ..rules.support import plain, rows, tokens
from . import test_trained_masks
from .test_trained_dictionaries import check_keys, experiment, run, train, write
from .test_trained_masks import HERE, QUICK, chosen_sites
from .test_trained_rotations import LOSS, MEASURE, OTHER, training_errors
from .test_trained_rotations import loss_by_hand as loss_of_logits

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
SITE = "resid_post layer 1"
PLACES = "token 1, {token 2, token 3}, token 4, last token"
differentiable = inspect.unwrap(side_by_side)
"""The reference pass, differentiable in the written vectors."""


def fit(
    options: str = QUICK,
    *,
    mask: str = "size: 2",
    at: str = f"{SITE} at {PLACES}",
    **given: str,
) -> str:
    return test_trained_masks.fit(options, mask=mask, at=at, **given)


PATCH = ("from turned into clean", f"patch {SITE} at g tokens")
PATCHES = experiment(*PATCH)


def training_rows(path: Path, model: Any, side: Any = None) -> tuple[TrainedMask, PositionMaskRows]:
    mask, found = test_trained_masks.training_rows(path, model, side)
    assert isinstance(found, PositionMaskRows)
    return mask, found


# --- the loss -------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "items": (SITE, "each item token", tuple(f"item {n} token" for n in range(1, 8))),
    "spans": (SITE, "subject tokens, cue token", ("subject tokens", "cue token")),
    "joined": (
        "mlp_out layer 0",
        "{item 1 token, cue token}, item 2 token",
        ("{item 1 token, cue token}", "item 2 token"),
    ),
    "head": ("z layer 1 head 2", "token 2, last token", ("token 2", "last token")),
    "heads": ("z layer 0", "token 1..3", ("token 1", "token 2", "token 3")),
    "embeddings": ("embed", "token *  align left", tuple(f"token {n}" for n in range(13))),
}
SOURCES = ("from: turned", "with: zero", "with: mean")


def hits(row: int, run: str, written: str) -> list[int]:
    """Token indices of a position; empty if the row lacks it."""
    text = rows(run)[row]
    if written.startswith("token ") and int(written.split()[1]) > text.last:
        return []
    if written.startswith("item ") and written.removesuffix(" token") not in text.spans:
        return []
    return tokens(text, written)


def value_by_hand(
    family: str, row: int, site: str, places: tuple[str, ...], shares: Tensor, source: str
) -> Tensor:
    """The measure of one unpadded prompt with a weight for each position."""
    words = site.split()
    key = words[0], int(words[2]) if len(words) > 2 else None

    def flat(run: str, row: int, token: int) -> Tensor:
        vectors = plain(family, rows(run)[row])[key][token]
        return vectors if len(words) < 5 else vectors[int(words[4])][None]

    writes: list[Write] = []
    for number, place in enumerate(places):
        to = hits(row, "clean", place)
        of = hits(row, source.removeprefix("from: "), place) if "from" in source else to
        for slot, (here, there) in enumerate(zip(to, of, strict=True)):
            own = flat("clean", row, here)
            new = torch.zeros_like(own)
            if "from" in source:
                new = flat(source.removeprefix("from: "), row, there)
            if source == "with: mean":
                every = (hits(n, "clean", place) for n in range(4))
                read = [flat("clean", n, at[slot]) for n, at in enumerate(every) if at]
                new = torch.stack(read).mean(0)
            mixed = own + shares[number] * (new - own)
            for unit in range(len(mixed)):
                named = int(words[4]) if len(words) > 4 else unit
                writes.append(Write(*key, mixed[unit], here, named))
    (done,) = differentiable(family, double(family), rows("clean")[row].ids, [(writes, ())])
    return loss_of_logits(done.logits[-1], row)


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES))
@pytest.mark.parametrize(("case", "side"), in_turn(tuple(CASES), ("left", "right")))
def test_position_mask_loss_and_gradient_equal_autograd(
    case: str, side: Any, family: str, source: str, tmp_path: Path
) -> None:
    """For every row, in ragged batches of two rows with different gates."""
    site, at, places = CASES[case]
    if case == "spans":  # the other run changes the subject, which has one to three tokens
        source = "with: zero" if source == "with: mean" else source.replace("turned", "other")
    options = QUICK.replace("25%", "0%")
    line = fit(options, source=source, at=f"{site} at {at}", mask="size: 1")
    used = experiment(f"ablate {site} at g tokens with zero", block="p")
    line = line.replace("validation", "measure_on_training_rows: true, validation")
    mask, found = training_rows(write(tmp_path, line, used), double(family), side)
    assert len(mask.candidates) <= len(places)
    random = torch.Generator().manual_seed(5)
    ids = found.objective.table.row_ids
    for batch in ([0, 2], [1, 3]):
        sixteenths = torch.randint(1, 16, (2, len(mask.candidates)), generator=random)
        mine = sixteenths.double() / 16  # exact in float32, the dtype of gates
        mine.requires_grad_()
        theirs = mine.detach().clone().requires_grad_()
        values = found.values(np.array(batch), mine)
        expected = torch.stack(
            [value_by_hand(family, ids[row], site, places[: len(mask.candidates)], theirs[n],
                           source)
             for n, row in enumerate(batch)]
        )  # fmt: skip
        unchanged = found.values(np.array(batch), None)
        least = 1e-10 if family == "gpt2" else 1e-6  # the other families have float32 norms
        assert torch.allclose(values - unchanged, expected - unchanged, rtol=1e-4, atol=least)
        assert (expected - unchanged).abs().max() > 1e-8
        (own,) = torch.autograd.grad(values.sum(), mine)
        (other,) = torch.autograd.grad(expected.sum(), theirs)
        largest = other.abs().max().item()
        assert torch.allclose(own, other, rtol=1e-4, atol=max(least, 1e-5 * largest))
        assert largest > 1e-8


def test_position_mask_report_has_means_over_held_out_rows(tmp_path: Path) -> None:
    path = write(tmp_path, fit(), PATCHES)
    (found,) = train(path)
    mask, known = training_rows(path, double("llama"))
    places = ("token 1", "{token 2, token 3}", "token 4", "last token")
    stored = json.loads((found.folder / "mask.json").read_text("utf-8"))
    assert stored["sites"] == [[0], [1], [2], [3]]
    assert stored["labels"] == ["token 1", "{token 2, token 3}", "token 4", "last token"]
    assert sum(stored["probabilities"]) == pytest.approx(2)
    report = found.report
    assert isinstance(report, MaskReport)
    (row,) = known.rows[: known.held_out_count].tolist()
    for chosen, own in (
        (stored["chosen"], report.trained),
        ([], report.unpatched),
        ([0, 1, 2, 3], report.whole),
    ):
        shares = torch.zeros(4, dtype=torch.float64)
        shares[chosen] = 1
        value = value_by_hand(
            "llama", known.objective.table.row_ids[row], SITE, places, shares, "from: other"
        )
        assert own == pytest.approx(value.item(), abs=2e-3)
    assert chosen_sites(found) == [stored["labels"][n] for n in stored["chosen"]]
    assert (report.noun, report.candidates, len(mask.chosen)) == ("position", 4, 2)


def test_positions_missing_in_all_training_rows_have_no_gate(tmp_path: Path) -> None:
    """These positions are neither chosen nor random controls; with a mean they aren't written."""
    for source in ("with: mean", "from: turned"):
        at = f"{SITE} at token * align left"
        line = fit(QUICK.replace("25%", "50%"), source=source, at=at, mask="size: 2, keep: true")
        used = experiment(f"ablate {SITE} at g tokens with zero", block="second")
        path = write(tmp_path, line, used)
        _, found = training_rows(path, double("llama"))
        lengths = [len(row.ids) for row in found.objective.table.runs["clean"].rows]
        trained = max(lengths[row] for row in found.rows[found.held_out_count :])
        assert found.active.tolist() == list(range(trained))
        edit = torch.zeros(1, max(lengths))
        edit[:, trained:] = 1
        longest = np.array([int(np.argmax(lengths))])
        changed = found.values(longest, edit) - found.values(longest, None)
        assert (changed.abs().item() > 1e-6) == (source != "with: mean" and trained < max(lengths))


# --- planted positions ----------------------------------------------------------------------------

THERE = (1, 4, 5)
PLANTED = """
prompts planted {
  rows "planted.jsonl"
  template "{a} {b} {c} {d} {e} {f} w40"
  answer " w1"
  corrupt swapped { a = a2  b = b2  c = c2  d = d2  e = e2  f = f2 }
  split 60%
}
"""


@cache
def planted() -> Any:
    """A model with equal embeddings of the words w20 to w35; planted positions have other words."""
    model: Any = copy.deepcopy(families.module("gpt2"))
    ids = [word_tokenizer()(f"w{n}")["input_ids"][-1] for n in range(20, 36)]
    with torch.no_grad():
        model.transformer.wte.weight[ids] = model.transformer.wte.weight[ids[0]].clone()
    return unchanged(model.eval())


def write_planted(folder: Path, *parts: str) -> Path:
    random = np.random.default_rng(7)
    lines: list[str] = []
    for _ in range(60):
        row: dict[str, str] = {}
        for number, name in enumerate("abcdef", start=1):
            low, high = (0, 20) if number in THERE else (20, 36)
            one, two = random.choice(np.arange(low, high), 2, replace=False)
            row |= {name: f"w{one}", f"{name}2": f"w{two}"}
        lines.append(json.dumps(row))
    (folder / "planted.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return write(folder, *parts, blocks=PLANTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["indices", "parts", "kept"])
@pytest.mark.parametrize("seed", range(3))
def test_position_mask_finds_planted_positions(name: str, seed: int, tmp_path: Path) -> None:
    at = "token 1..6" if name != "parts" else ", ".join(f"{each} token" for each in "abcdef")
    mask, objective = "size: 3", "minimise: kl(swapped)"
    if name == "kept":
        mask, objective = 'size: 3, keep: true, kind: "straight_through"', "minimise: kl(clean)"
    call = (
        f"group g = fit(mask({mask}), prompts: planted.train, from: swapped, {objective}, "
        f"steps: 150, batch: 16, seed: {seed}) at embed at {at}\n"
    )
    rule = ("from swapped into clean", "patch embed at g tokens")
    text = experiment(*rule, block="planted.test", measure="measure kl(swapped) as raw")
    path = write_planted(tmp_path, call, text)
    given = {"m": (planted(), word_tokenizer())}
    (found,) = mechdsl.fit(path, given, store=tmp_path / "store")
    words = [f"{'abcdef'[n - 1]} token" if name == "parts" else f"token {n}" for n in THERE]
    assert chosen_sites(found) == words
    report = found.report
    assert isinstance(report, MaskReport)
    assert report.trained == pytest.approx(0, abs=1e-4)
    assert report.random > 0.01
    done = mechdsl.run(path, given, store=tmp_path / "store")
    assert np.allclose(done.files[0].experiments[0].measures[0].patched, 0, atol=1e-4)


# --- use in rules ---------------------------------------------------------------------------------

RULES = {
    "patch": list(PATCH),
    "each": ["from turned into clean", f"patch {SITE} at each g token"],
    "other site": ["from turned into clean", "patch layer * head * at g tokens"],
    "zero": [f"ablate {SITE} at g tokens with zero"],
    "mean": [f"ablate {SITE} at g tokens with mean"],
    "resample": ["ablate embed at each g token with resample"],
    "except": [f"ablate {SITE} at tokens except g tokens with zero"],
    "joined": ["from turned into clean", f"patch {SITE} at {{g tokens, token 2}}"],
    "offset": ["from turned into clean", f"patch {SITE} at each g token + 1"],
    "steer": [f"scale {SITE} at g tokens by 2"],
    "edges": ["block attention layers * from last token to g tokens"],
    "tokens": ['replace each g token with "w3"'],
    "noise": ["from turned into clean", f"patch {SITE} at g tokens", "against random(3)"],
    "derived": [
        f"run changed {{ ablate {SITE} at g tokens with zero }}",
        "from changed into clean",
        "patch resid_post layer 2 at last token",
    ],
    "replies": ["generate 3", f"ablate {SITE} at g tokens with zero"],
}


@pytest.mark.parametrize("name", some(RULES, [*RULES][2::4]))
def test_position_mask_equals_its_listed_positions_in_rules(name: str, tmp_path: Path) -> None:
    """Up to rounding, with a second experiment on the same block."""
    measure = "measure logit(answer) as raw" if name == "replies" else MEASURE
    at = f"{SITE} at token 1, token 2, token 3"
    path = write(tmp_path, fit(at=at), experiment(*RULES[name], measure=measure) + OTHER)
    (trained,) = train(path, out=tmp_path)
    card = (tmp_path / "g" / "README.md").read_text("utf-8")
    assert card.startswith("# g: mask of 2 of 3 positions")
    assert "The chosen positions are set to those of the run `other`" in card
    own = run(path, fresh=True).files[0].experiments
    places = ", ".join(chosen_sites(trained))
    lines = [
        each.replace("each g token", places).replace("g tokens", f"{{{places}}}")
        for each in RULES[name]
    ]
    if name == "offset":
        lines[-1] = f"patch {SITE} at " + ", ".join(f"{own} + 1" for own in places.split(", "))
    path = write(tmp_path, experiment(*lines, measure=measure) + OTHER)
    theirs = run(path, store=False).files[0].experiments
    assert len(own) == len(theirs) == 2
    for one, two in zip(own, theirs, strict=True):
        assert len(one.cells) == len(two.cells)
        for mine, other in zip(one.measures, two.measures, strict=True):
            assert np.allclose(mine.patched, other.patched, 0, 2e-6, equal_nan=True)
    said = own[0].conventions["group g"]
    assert said.startswith(" + ".join(chosen_sites(trained)))
    assert "mask of 2 of 3 positions trained on 4 rows of p at token 1, token 2, token 3" in said
    assert "group g" not in own[1].conventions


def replies(result: mechdsl.ExperimentResult) -> list[dict[int, list[list[int]]]]:
    """The tokens of the completions of every cell and row."""
    assert result.replies is not None
    return [
        {row: [list(each.ids) for each in own] for row, own in cell.items()}
        for cell in result.replies.cells
    ]


@pytest.mark.parametrize("place", ["g tokens", "each g token"])
def test_last_token_of_a_position_mask_follows_generation(place: str, tmp_path: Path) -> None:
    """As in a list of positions."""
    at = f"{SITE} at token 1, last token, token 2"
    call = fit(at=at, source="from: other", objective="minimise: kl(other)")
    lines = ("generate 4", f"ablate {SITE} at {place} with zero")
    text = experiment(*lines, measure="measure length as raw")
    path = write(tmp_path, call, text)
    (trained,) = train(path)
    chosen = chosen_sites(trained)
    assert "last token" in chosen
    own = run(path).files[0].experiments[0]
    listed = ", ".join(chosen)
    listed = listed if place == "each g token" else f"{{{listed}}}"
    path = write(tmp_path, text.replace(place, listed))
    theirs = run(path, store=False).files[0].experiments[0]
    assert replies(own) == replies(theirs)
    only = text.replace(place, "{" + next(each for each in chosen if each != "last token") + "}")
    other = run(write(tmp_path, only), store=False).files[0].experiments[0]
    assert replies(other) != replies(own)


@pytest.mark.slow
def test_position_mask_over_image_patches_equals_its_listed_positions(tmp_path: Path) -> None:
    """Compare a rule on the mask with a rule that lists the chosen patches."""
    head = """mech 1
model vit = zoo("shapes")
images scenes {
  kind in ["circle", "square"]
  image shapes(n: 1, kind: kind, size: 32)
  answer "{kind}"
  split 50%
}
"""
    mask = (
        "group g = fit(mask(size: 6), prompts: scenes.train, limit: 8, with: mean, minimise: "
        "logit(answer), steps: 3, batch: 4) at embed at image row 3..5 col 2..6 token\n"
    )
    text = """experiment e {
  images scenes.test limit 6
  ablate embed at g tokens with mean
  measure logit(answer) as delta
}
"""
    path = tmp_path / "file.mech"
    path.write_text(head + mask + text, "utf-8")
    (found,) = mechdsl.fit(path, store=tmp_path / "store")
    (own,) = mechdsl.run(path, store=tmp_path / "store").files[0].experiments
    places = ", ".join(f"{each} token" for each in chosen_sites(found))
    path.write_text(head + text.replace("g tokens", f"{{{places}}}"), "utf-8")
    (theirs,) = mechdsl.run(path, store=False).files[0].experiments
    assert np.allclose(own.measures[0].patched, theirs.measures[0].patched, 0, 2e-6)


# --- keys -----------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "size": {"mask": "size: 1"},
    "keep": {"mask": "size: 2, keep: true"},
    "site": {"at": f"mlp_out layer 1 at {PLACES}"},
    "layer": {"at": f"resid_post layer 0 at {PLACES}"},
    "positions": {"at": f"{SITE} at token 0, {PLACES}"},
    "division": {"at": f"{SITE} at {{token 1, token 2}}, token 3, token 4, last token"},
    "source": {"source": "from: turned"},
    "zero": {"source": "with: zero"},
    "mean": {"source": "with: mean"},
    "sign": {"objective": f"minimise: {LOSS}"},
    "measure": {"objective": "maximise: logprob(wrong) - 0.4 * logit(answer)"},
}


def test_position_mask_key_depends_on_every_argument(tmp_path: Path, trains_all: bool) -> None:
    """A different argument needs another training; another spelling doesn't."""
    base, _ = check_keys(tmp_path, trains_all, fit, CHANGES, PATCHES)
    for parts in (
        (fit(name="h"), PATCHES.replace("g tokens", "h tokens")),
        (fit(at=f"{SITE} at token 1, {{tokens 2..3}}, token 4, token -1"), PATCHES),
    ):
        (found,) = train(write(tmp_path, *parts))
        assert (found.folder, found.seconds) == (base.folder, 0.0)


def test_cached_run_depends_on_the_positions_of_a_mask(tmp_path: Path) -> None:
    path = write(tmp_path, fit(), PATCHES)
    train(path)
    before = run(path).files[0].experiments[0].measures[0].patched
    path = write(tmp_path, fit(objective=f"minimise: {LOSS}"), PATCHES)
    train(path)
    assert not np.array_equal(before, run(path).files[0].experiments[0].measures[0].patched)


def test_untrained_position_mask_uses_the_first_positions(tmp_path: Path) -> None:
    path = write(tmp_path, fit(), PATCHES)
    mask, _ = training_rows(path, double("llama"))
    assert [each.label for each in mask.chosen if isinstance(each, PositionChoice)] == [
        "1",
        "{token 2, token 3}",
    ]
    assert not mask.is_trained


# --- mistakes -------------------------------------------------------------------------------------

CALL = f"fit(mask(size: 2), prompts: p, from: other, maximise: {LOSS})"
MISTAKES: dict[str, tuple[str, str, str]] = {
    "sites too": (SITE, "layers * heads *", "E0342"),
    "layers too": (SITE, "mlp_out layers 0, 1", "E0342"),
    "sweep of sites": (SITE, "mlp_out layer *", "E0342"),
    "dimensions": (SITE, f"{SITE} dims *", "E0342"),
    "group as site": (SITE, "some", "E0342"),
    "twice": ("token 4", "token 1", "E0342"),
    "overlap": ("token 4", "{token 4, token 3}", "E0342"),
    "all": ("size: 2", "size: 4", "E0342"),
    "answer": ("token 4", "answer tokens", "E0"),
    "mean of uneven": ("from: other", "with: mean", "E0324"),
    "ranking": ("last token", "top 3 of control tokens", "E0207"),
    "lacking": ("token 4", "token 40", "E0310"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_position_mask_argument_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code = MISTAKES[name]
    line = f"group g = {CALL} at {SITE} at {PLACES}\n"
    assert old in line
    line = line.replace(old, new)
    if name == "mean of uneven":
        line = line.replace("token 4", "subject tokens")
    other = "group some = L0H1, L1H2\n" if name == "group as site" else ""
    path = write(tmp_path, other, line, PATCHES, OTHER)
    errors = training_errors(path)
    assert errors[0].code.startswith(code), errors


USES: dict[str, tuple[str, str, str]] = {
    "site": ("patch g at last token", "E0207", "chooses positions, not sites"),
    "exception": ("patch layers * heads * except g at last token", "E0207", "at g tokens"),
    "path": ("path layer 0 head * -> q g at last token", "E0207", "chooses positions"),
    "edge": ("block attention g from last token to token 1", "E0207", "chooses positions"),
    "singular": (f"patch {SITE} at g token", "E0207", "names several positions"),
    "span": (f"patch {SITE} at last token of g", "E0207", "names several positions"),
    "tokens of it": (f"patch {SITE} at each token of g", "E0207", "names several positions"),
    "occurrence": (f"patch {SITE} at g 2 tokens", "E0207", "names several positions"),
}


def test_group_that_lists_a_position_mask_reports_it_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        fit(),
        "group a = g, L0H1\n",
        experiment("from turned into clean", "patch a at last token"),
    )
    with pytest.raises(mechdsl.MechdslError, match="`g` chooses positions, not sites") as found:
        train(path)
    errors = [each for each in found.value.diagnostics if each.severity == "error"]
    assert [each.code for each in errors] == ["E0207"]


@pytest.mark.parametrize("edge", ["g -> logits", "embed -> g", "L0H1 -> L1H0.q, g -> logits"])
def test_edge_of_a_position_mask_is_an_error_that_states_the_type(
    edge: str, tmp_path: Path
) -> None:
    rule = experiment("from turned into clean", "ablate c at tokens * with turned")
    with pytest.raises(mechdsl.MechdslError) as found:
        train(write(tmp_path, fit(), f"circuit c = {edge}\n", rule))
    (error,) = (each for each in found.value.diagnostics if each.severity == "error")
    assert error.code == "E0207"
    assert error.span is not None
    assert error.span.written == "g"
    assert "`g` chooses positions, not sites" in error.message
    assert "write `at g tokens` in a rule" in error.help_text


@pytest.mark.parametrize("name", USES)
def test_position_mask_in_unsupported_places_is_rejected(name: str, tmp_path: Path) -> None:
    rule, code, text = USES[name]
    lines = ("from turned into clean", rule)
    path = write(
        tmp_path, fit(), experiment(*lines), PATCHES.replace("experiment e", "experiment f")
    )
    with pytest.raises(mechdsl.MechdslError, match=text) as found:
        train(path)
    errors = [each for each in found.value.diagnostics if each.severity == "error"]
    assert errors[0].code == code, errors


def test_position_mask_rejects_span_names_and_rows_without_its_positions(tmp_path: Path) -> None:
    """A group with the name of a prompt part, and rows without the chosen positions."""
    call = fit(name="cue").replace("25%", "25%, measure_on_training_rows: true")
    used = experiment(f"ablate {SITE} at cue tokens with zero", block="p")
    with pytest.raises(mechdsl.MechdslError, match="`cue` is also a part of the prompts"):
        train(write(tmp_path, call, used))
    chosen = fit(at=f"{SITE} at token 8..10 align left")
    used = experiment(f"ablate {SITE} at each g token with zero", block="even")
    with pytest.raises(mechdsl.MechdslError) as found:
        train(write(tmp_path, chosen, used))
    assert found.value.diagnostics[0].code == "E0310"
    contains = PATCHES.replace("  stats", "  expect top 1 contains g\n  stats")
    with pytest.raises(mechdsl.MechdslError):
        train(write(tmp_path, fit(), contains))
