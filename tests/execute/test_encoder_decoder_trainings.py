"""Trainings by an effect in encoder-decoders, against autograd and plain hooks on the bare model
for one unpadded prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.execute import training
from mechdsl.execute.mask_training import MaskRows, open_rows
from mechdsl.execute.objective_rows import ObjectiveRows
from mechdsl.execute.training import VectorCache
from mechdsl.fits.training import Training
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.models.shape import PaddingSide
from mechdsl.pipeline.trained_files import DeclaredFit, fits_of_file, list_training_costs
from mechdsl.resolve.types import TrainedMask

from ..quick import in_turn, some
from .encoder_decoders import (
    HEADS,
    WIDTH,
    Change,
    Place,
    Text,
    Write,
    difference,
    logits,
    model,
    place,
    read,
    starts,
    text,
    tokenizer,
    written,
)
from .support import (
    DIFFERENCE,
    PROMPTS,
    ROWS,
    Record,
    as_in_the_data,
    context,
    experiment,
    token,
    try_file,
    write_rows,
)
from .test_encoder_decoder_gradients import run_with_gradients

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

FAMILIES = ("t5", "bart", "t5gemma")
QUICK = "steps: 3, batch: 2, rate: 0.3, validation: 25%, measure_on_training_rows: true"
MEASURE = "logit(answer) - logit(wrong)"
OPTIONS = f"prompts: p, {QUICK}, maximise: {MEASURE}"


@cache
def loaded(family: str) -> LoadedModel:
    found, problems = adopt_model("m", model(family), tokenizer())
    assert found is not None, problems
    return found


def write_file(
    folder: Path, lines: str, prompts: str = PROMPTS, rows: Sequence[Record] = ROWS
) -> Path:
    folder.mkdir(exist_ok=True)
    write_rows(folder, rows)
    path = folder / "file.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{prompts}\n{lines}', "utf-8")
    return path


def declared_fit(path: Path, family: str) -> DeclaredFit:
    """The only training of a file."""
    source = Source(path.read_text("utf-8"), path)
    found = check_source(source, models={"m": context(source, "m", loaded(family))})
    assert not has_errors(found.diagnostics), found.diagnostics
    (declared,) = fits_of_file(found).values()
    return declared


def train_and_run(folder: Path, lines: str, family: str, **options: Any) -> tuple[Any, list[Any]]:
    """The training of a file, and the results of its experiments."""
    path, models = write_file(folder, lines, **options), {"m": (model(family), tokenizer())}
    [trained] = mechdsl.fit(path, models, store=folder / "store")
    found = mechdsl.run(path, models, store=folder / "store")
    return trained, [as_in_the_data(each) for each in found]


@dataclass(frozen=True)
class Where:
    """A site with its tokens, as a file and as the bare model name them."""

    site: str
    """`z cross layer 1 head 1`"""
    at: str

    @property
    def name(self) -> str:
        return self.site.partition(" layer ")[0]

    @property
    def numbers(self) -> list[int]:
        """The layer and, if the site names one, the head."""
        return [int(word) for word in self.site.split() if word.isdigit()]

    def place(self, family: str) -> Place:
        return place(family, self.name, *self.numbers)

    def tokens(self, family: str, of: Text) -> list[int]:
        return tokens(family, self.name, self.at, of)

    def read(self, family: str, of: Text) -> Tensor:
        """[token, width] vectors of an unpatched run."""
        return read(family, of, self.place(family))[self.tokens(family, of)]

    def write(self, family: str, of: Text, change: Change) -> Write:
        return self.place(family), self.tokens(family, of), change


def tokens(family: str, name: str, at: str, of: Text) -> list[int]:
    """The tokens of a position: of the prompt at sites of the encoder, otherwise the decoder's."""
    if "encoder" not in name and name not in ("k cross", "v cross"):
        assert at == "last token"
        return [len(starts(family)) - 1]
    return {"item tokens": list(of.items), "subject tokens": list(of.subject)}.get(at, [of.last])


CASES = [
    Where("resid_post encoder layer 1", "subject tokens"),
    Where("z cross layer 1 head 1", "last token"),
    Where("mlp_out layer 0", "last token"),
    Where("v cross layer 2 head 0", "item tokens"),
    Where("z encoder layer 1 head 1", "item tokens"),
    Where("resid_post layer 1", "last token"),
]
SIDES: tuple[PaddingSide, ...] = ("left", "right")

Edit = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The parameters and the vectors of both runs → the vectors that are written."""

EDITS: dict[str, tuple[str, Edit]] = {
    "vector": ("direction d = fit(vector", lambda v, own, other: own + v[0]),
    "das": ("basis d = fit(das(dims: 2)", lambda r, own, other: own + (other - own) @ r.T @ r),
    "scales": ("direction d = fit(scales", lambda v, own, other: own * v[0]),
}


def used(kind: str, where: Where) -> tuple[str, ...]:
    """The lines of an experiment with a trained direction or basis."""
    if kind == "vector":
        return f"add d to {where.site} at {where.at}", DIFFERENCE
    if kind == "scales":
        return f"scale {where.site} at {where.at} by d", DIFFERENCE
    rule = f"patch {where.site} in basis d at {where.at}"
    return "from other into clean", rule, DIFFERENCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("where", "kind"), in_turn(CASES, list(EDITS)))
def test_loss_and_gradient_of_an_edit_equal_autograd(
    where: Where, kind: str, family: str, tmp_path: Path
) -> None:
    """For every row, in ragged batches of two rows, one padded on the left, one on the right."""
    line, edit = EDITS[kind]
    source = ", from: other" if kind == "das" else ""
    lines = f"{line}, {OPTIONS}{source}) at {where.site} at {where.at}\n"
    path = write_file(tmp_path, lines + experiment("e", "prompts p", *used(kind, where)))
    fit = declared_fit(path, family)
    assert fit.objective is not None
    ids = fit.objective.table.row_ids
    both = [[where.read(family, text(row, run)) for run in ("clean", "other")] for row in ROWS]
    first = torch.cat([both[number][0] for number in ids])
    random = torch.Generator().manual_seed(5)
    start = 0.3 * torch.randn(2, first.shape[1], generator=random)
    for side, batch in zip(SIDES, ([0, 2], [1, 3]), strict=True):
        rows = ObjectiveRows(fit.training, fit.objective, loaded(family), side)
        assert sorted(rows.rows.tolist()) == [0, 1, 2, 3]
        torch.testing.assert_close(rows.first_vectors, first, atol=2e-5, rtol=1e-4)
        mine, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
        with torch.enable_grad():
            values = rows.values(np.array(batch), partial(edit, mine))
            wanted = []
            for number in (ids[row] for row in batch):
                of = text(ROWS[number])
                new = edit(theirs, *both[number])
                write = where.write(family, of, lambda _, new=new: new)
                wanted.append(run_with_gradients(family, of, [write], ROWS[number]))
            (own,) = torch.autograd.grad(values.mean(), mine)
            (other,) = torch.autograd.grad(torch.stack(wanted).mean(), theirs)
        np.testing.assert_allclose(
            values.detach(), torch.stack(wanted).detach(), atol=1e-4, rtol=1e-4
        )
        np.testing.assert_allclose(own, other, atol=2e-5, rtol=1e-3)
        assert other.abs().max() > 1e-3


# --- trained edits in experiments -----------------------------------------------------------------


def apply_file(kind: str, trained: Any, own: Tensor, other: Tensor) -> Tensor:
    """What a trained edit writes, from the tensors of its file."""
    (file,) = trained.folder.glob("*.safetensors")
    saved = load_file(file)
    match kind:
        case "vector":
            return own + saved["vector"]
        case "scales":
            return own * saved["vector"]
        case "soft":
            return torch.stack([saved["vector.position0"]] * len(own))
        case "reft":
            reads, writes, offset = (
                saved[f"edit.{name}"] for name in ("reads", "writes", "offset")
            )
            return own + own @ reads.T @ writes + offset
        case _:
            return own + (other - own) @ saved["rotation"].T @ saved["rotation"]


LINES = {
    "vector": ("direction d = fit(vector", "add d to {site} at {at}"),
    "reft": ("direction d = fit(reft(rank: 2)", "add d to {site} at {at}"),
    "scales": ("direction d = fit(scales", "scale {site} at {at} by d"),
    "soft": ("direction d = fit(soft_prompt(tokens: 1)", "set {site} at {at} to d"),
    "das": ("basis d = fit(das(dims: 2)", "patch {site} in basis d at {at}"),
    "boundless": ("basis d = fit(boundless_das", "patch {site} in basis d at {at}"),
}
USED_AT = [
    Where("resid_post encoder layer 1", "last token"),
    Where("attn_out cross layer 1", "last token"),
    Where("mlp_out layer 0", "last token"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "where"), in_turn(list(LINES), USED_AT))
def test_trained_edits_and_their_reports_equal_hooks(
    kind: str, where: Where, family: str, tmp_path: Path
) -> None:
    start, rule = LINES[kind]
    patches = rule.startswith("patch")
    source = ", from: other" if patches else ""
    rule = rule.format(site=where.site, at=where.at)
    lines = f"{start}, {OPTIONS}{source}) at {where.site} at {where.at}\n"
    given = ["prompts p", *(["from other into clean"] if patches else []), rule, DIFFERENCE]
    trained, [found] = train_and_run(tmp_path, lines + experiment("e", *given), family)
    values = []
    for record in ROWS:
        base, other = text(record), text(record, "other")
        new = apply_file(kind, trained, where.read(family, base), where.read(family, other))
        write = where.write(family, base, lambda _, new=new: new)
        values.append(difference(logits(family, base, [write]), record))
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=3e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.01
    assert min(abs(trained.report.trained - value) for value in values) < 3e-4  # one held-out row


# --- masks ----------------------------------------------------------------------------------------

MASKS: dict[str, tuple[str, str, str]] = {
    "layers of the encoder": ("resid_post encoder layers *", "subject tokens", "from: other"),
    "heads of cross": ("z cross layers * heads *", "last token", "from: other"),
    "values of the encoder": ("v cross layers * heads *", "item tokens", "with: zero"),
    "heads of the encoder": ("z encoder layers * heads *", "last token", "with: mean"),
    "MLPs of the decoder": ("mlp_out layers *", "last token", "from: other"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "side"), in_turn(list(MASKS), SIDES, tuple(MASKS)[:3]))
def test_mask_loss_and_gradient_equal_autograd(
    name: str, side: PaddingSide, family: str, tmp_path: Path
) -> None:
    """With random shares of all candidates; a write sees those at earlier layers."""
    site, at, source = MASKS[name]
    lines = f"group g = fit(mask(size: 1), {OPTIONS}, {source}) at {site} at {at}\n"
    rule = f"ablate g at {at} with zero"
    path = write_file(tmp_path, lines + experiment("e", "prompts p", rule, DIFFERENCE))
    fit = declared_fit(path, family)
    assert isinstance(fit.file, TrainedMask)
    assert fit.objective is not None
    rows = open_rows(fit.file, fit.objective, loaded(family), side, VectorCache())
    ids = fit.objective.table.row_ids
    trained = [ids[row] for row in rows.rows[rows.held_out_count :]]
    random = torch.Generator().manual_seed(3)
    shares = torch.rand(len(fit.file.candidates), generator=random)
    mine, theirs = shares.clone().requires_grad_(), shares.clone().requires_grad_()
    with torch.enable_grad():
        values = rows.values(np.arange(4), mine)
        wanted = [mixed(family, rows, number, at, source, theirs, trained) for number in ids]
        (own,) = torch.autograd.grad(values.sum(), mine)
        (other,) = torch.autograd.grad(torch.stack(wanted).sum(), theirs)
    np.testing.assert_allclose(values.detach(), torch.stack(wanted).detach(), atol=2e-4)
    np.testing.assert_allclose(own, other, atol=1e-4, rtol=1e-3)
    assert other.abs().max() > 1e-3


def mixed(
    family: str,
    rows: MaskRows,
    number: int,
    at: str,
    source: str,
    shares: Tensor,
    trained: Sequence[int],
) -> Tensor:
    """The measure of one prompt with all candidates written to their shares."""
    record, writes = ROWS[number], list[Write]()
    of, other = text(record), text(record, "other")
    for share, candidate in zip(shares, rows.candidates, strict=True):
        site, layer, head = (getattr(candidate, name) for name in ("site", "layer", "unit"))
        own = place(family, site, layer, head)

        def vectors(of: Text, own: Place = own, site: str = site) -> Tensor:
            return read(family, of, own)[tokens(family, site, at, of)]

        if source == "from: other":
            new = vectors(other)
        else:
            new = torch.stack([vectors(text(ROWS[each])).mean(0) for each in trained]).mean(0)
            new = new if source == "with: mean" else 0 * new

        def change(value: Tensor, share: Tensor = share, new: Tensor = new) -> Tensor:
            return value + share * (new - value)

        writes.append((own, tokens(family, site, at, of), change))
    return run_with_gradients(family, of, writes, record)


CHOSEN = {
    "sites": ("z cross layers * heads * at last token", "patch g at last token"),
    "dimensions": ("resid_post encoder layer 1 dims * at last token", "patch g at last token"),
    "positions": (
        "resid_post encoder layer 1 at each item token",
        "patch resid_post encoder layer 1 at g tokens",
    ),
}


@pytest.mark.parametrize("family", some(FAMILIES, ("bart",)))
@pytest.mark.parametrize("kind", CHOSEN)
def test_chosen_group_acts_as_hooks(kind: str, family: str, tmp_path: Path) -> None:
    at, rule = CHOSEN[kind]
    lines = f"group g = fit(mask(size: 1), {OPTIONS}, from: other) at {at}\n"
    given = "prompts p", "from other into clean", rule, DIFFERENCE
    trained, [found] = train_and_run(tmp_path, lines + experiment("e", *given), family)
    saved = json.loads((trained.folder / "mask.json").read_text("utf-8"))
    (chosen,) = (saved["sites"][index] for index in saved["chosen"])
    for number, record in enumerate(ROWS):
        of, other = text(record), text(record, "other")
        own = place(family, "resid_post encoder", 1)
        one, at_token = slice(None), [of.last]
        if kind == "sites":
            own, at_token = place(family, "z cross", chosen[1]), [len(starts(family)) - 1]
            one = slice(chosen[2] * WIDTH, (chosen[2] + 1) * WIDTH)
        elif kind == "dimensions":
            one = slice(chosen[-1], chosen[-1] + 1)
        elif chosen[0] < len(of.items):
            at_token = [of.items[chosen[0]]]
        else:
            continue  # the row lacks the position
        new = read(family, other, own)[at_token][:, one]

        def change(value: Tensor, one: slice = one, new: Tensor = new) -> Tensor:
            value = value.clone()
            value[:, one] = new
            return value

        value = difference(logits(family, of, [(own, at_token, change)]), record)
        np.testing.assert_allclose(found.measures[0].patched[0, number], value, atol=2e-4)


# --- in combination -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", some(FAMILIES, ("t5",)))
def test_trained_vector_acts_with_rules_in_the_other_stack(family: str, tmp_path: Path) -> None:
    """In two experiments, one with a run that has the vector, and in generated text."""
    where = Where("resid_post encoder layer 1", "subject tokens")
    lines = f"direction d = fit(vector(length: 8), {OPTIONS}) at {where.site} at {where.at}\n"
    add, zero = (
        f"add d to {where.site} at {where.at}",
        "ablate z cross layer 1 head 0 at last token",
    )
    lines += experiment("both", "prompts p", add, f"{zero} with zero", DIFFERENCE)
    lines += experiment(
        "steered",
        "prompts p",
        f"run moved {{ {add} }}",
        "from moved into clean",
        "patch z cross layer 1 head 0 at last token",
        DIFFERENCE,
    )
    lines += experiment(
        "reply", "prompts p", "generate 4", add, 'measure matches("w1") as raw', "report texts"
    )
    trained, [both, steered, reply] = train_and_run(tmp_path, lines, family)
    head, at = place(family, "z cross", 1, 0), [len(starts(family)) - 1]
    for number, record in enumerate(ROWS):
        of = text(record)
        added = where.write(family, of, lambda own: apply_file("vector", trained, own, own))
        value = logits(family, of, [added, (head, at, torch.zeros_like)])
        np.testing.assert_allclose(
            both.measures[0].patched[0, number], difference(value, record), atol=3e-4
        )
        seen: list[Tensor] = []

        def keep(value: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(value.clone())
            return value

        logits(family, of, [added, (head, at, keep)])
        value = logits(family, of, [(head, at, lambda _, seen=seen: seen[0])])
        np.testing.assert_allclose(
            steered.measures[0].patched[0, number], difference(value, record), atol=3e-4
        )
        [cell] = reply.replies.cells[0][number]
        assert list(cell.ids) == written(family, of, [added], count=4)[0]


@pytest.mark.parametrize("family", some(("t5", "bart"), ("t5",)))
def test_soft_prompt_at_inserted_tokens_of_the_encoder_equals_hooks(
    family: str, tmp_path: Path
) -> None:
    """All later tokens move, and the decoder attends to the inserted ones."""
    insert = 'corrupt soft { insert 2 tokens before subject tokens with " w44" }'
    block = PROMPTS.replace("  corrupt turned", f"  {insert}\n  corrupt turned")
    options = OPTIONS.replace("prompts: p", "prompts: soft of p")
    lines = f"direction d = fit(soft_prompt(tokens: 2), {options}) at embed encoder at inserted "
    lines += "tokens\n"
    rule = "set embed encoder at inserted tokens to d"
    lines += experiment("e", "prompts p", "from clean into soft", rule, DIFFERENCE)
    trained, [found] = train_and_run(tmp_path, lines, family, prompts=block)
    saved = load_file(next(trained.folder.glob("*.safetensors")))
    vectors = torch.stack([saved["vector.position0"], saved["vector.position1"]])
    own = place(family, "embed encoder", 0)
    for number, record in enumerate(ROWS):
        of = text(record)
        first = of.subject[0]
        longer = replace(of, ids=(*of.ids[:first], token("w44"), token("w44"), *of.ids[first:]))
        write = own, [first, first + 1], lambda _: vectors
        value = difference(logits(family, longer, [write]), record)
        np.testing.assert_allclose(found.measures[0].patched[0, number], value, atol=2e-4)


# --- probes, and trainings on two sites -----------------------------------------------------------

PROBED = PROMPTS.replace(
    "  template", '  m = if cue = "w26" then 1 else if cue = "w28" then 4 else 7\n  template', 1
)
TARGETS = [1, 4, 7, 7]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "site", some(("z cross", "resid_post encoder", "mlp_out"), ("z cross", "mlp_out"))
)
def test_predictions_of_a_trained_probe_equal_hooks(site: str, family: str, tmp_path: Path) -> None:
    heads = site == "z cross"
    axes = "layer * head *" if heads else "layer *"
    options = "prompts: p, target: m, measure_on_training_rows: true"
    lines = f"probe q = fit(ridge(penalty: 0.01), {options}) at {site} {axes} at last token\n"
    lines += experiment("e", "prompts p", f"observe prediction(q) {site} {axes} at last token")
    path, models = write_file(tmp_path, lines, PROBED), {"m": (model(family), tokenizer())}
    [trained] = mechdsl.fit(path, models, store=tmp_path / "store")
    [found] = map(as_in_the_data, mechdsl.run(path, models, store=tmp_path / "store"))
    saved = load_file(next(trained.folder.glob("*.safetensors")))
    values = found.measures[0].patched.reshape(-1, HEADS if heads else 1, len(ROWS))
    for layer, of_layer in enumerate(values):
        for head, own in enumerate(of_layer):
            unit = [head] if heads else []
            key = f"layer.{layer}" + (f".head.{head}" if heads else "")
            where = Where(" ".join(map(str, [site, "layer", layer, *unit])), "last token")
            vectors = torch.cat([where.read(family, text(record)) for record in ROWS])
            wanted = vectors.double() @ saved[f"{key}.weight"].double().flatten()
            wanted += saved[f"{key}.bias"].double()
            np.testing.assert_allclose(own, wanted, atol=1e-3)
    assert np.ptp(values) > 0.2


MORE_ROWS = [*ROWS, *({**row, "cue": row["cue2"], "cue2": row["cue"]} for row in ROWS)]


@pytest.mark.parametrize("family", some(FAMILIES, ("t5gemma",)))
@pytest.mark.parametrize(
    ("site", "at", "view", "other", "run"),
    [
        ("resid_post encoder", "subject tokens", "", "resid_post encoder layer 0", "clean"),
        ("resid_post encoder", "last token", " at last token", "resid_post layer 0", "clean"),
        ("attn_out cross", "last token", " of other", "v cross layer 0 head 1", "other"),
    ],
)
def test_correlated_sites_have_the_vectors_of_hooks(
    site: str,
    at: str,
    view: str,
    other: str,
    run: str,
    family: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of the encoder with the decoder, which have different tokens."""
    given: list[list[float]] = []
    read_rows = training.read_rows

    def keep(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        found = read_rows(*args, **options)
        given.extend(each.tolist() for own in found for each in own)
        return found

    monkeypatch.setattr(training, "read_rows", keep)
    options = "prompts: p, measure_on_training_rows: true, validation: 50%"
    lines = f"basis b = fit(cca(components: 1), {options}, with: {other}{view})"
    lines += f" at {site} layer 1 at {at}\n"
    lines += experiment("f", "prompts p", "observe features of b at last token")
    train_and_run(tmp_path, lines, family, rows=MORE_ROWS)
    first, second = Where(f"{site} layer 1", at), Where(other, at)
    expected = []
    for record in MORE_ROWS:
        expected += first.read(family, text(record)).tolist()
        expected += second.read(family, text(record, run)).tolist()
    for each, others in ((given, expected), (expected, given)):
        for row in each:
            same = (other for other in others if len(other) == len(row))
            assert min(np.abs(np.subtract(row, other)).max() for other in same) < 1e-4


# --- cost -----------------------------------------------------------------------------------------


def count_step_flops(lines: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """Floating-point operations of all steps of a training."""
    counter, run = FlopCounterMode(display=False), Training.run

    def counted(self: Training, after_step: Callable[[int], None]) -> None:
        with counter:
            run(self, after_step)

    with monkeypatch.context() as patching:
        patching.setattr(Training, "run", counted)
        train_and_run(folder, lines, "bart")
    return counter.get_total_flops()


def test_plan_prices_backward_passes_by_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient at the first block of the encoder passes through one block more than one at the
    second block; at a site of the decoder, it doesn't pass through the encoder."""
    found, priced = [], []
    options = OPTIONS.replace("steps: 3", "steps: 20").replace("batch: 2", "batch: 4")
    for site in ("resid_post encoder layer 0", "resid_post encoder layer 1", "mlp_out layer 0"):
        lines = f"direction d = fit(vector, {options}) at {site} at last token\n"
        lines += experiment("e", "prompts p", f"add d to {site} at last token", DIFFERENCE)
        found.append(count_step_flops(lines, tmp_path / site, monkeypatch))
        path = tmp_path / site / "file.mech"
        source = Source(path.read_text("utf-8"), path)
        models = {"m": context(source, "m", loaded("bart"))}
        (price,) = list_training_costs(check_source(source, models=models))
        priced.append(price.cost.flops)
    block, estimated = found[0] - found[1], priced[0] - priced[1]
    assert block / 2 < estimated < 2 * block
    assert abs(priced[2] - priced[1]) < estimated / 2


# --- errors ---------------------------------------------------------------------------------------

INVALID: dict[str, tuple[str, str, str]] = {
    "a site of the other stack": (
        "basis b = fit(cca(components: 1), prompts: p, with: resid_post layer 0) at resid_post "
        "encoder layer 1 at last token\n",
        "E0342",
        "`resid_post` is at tokens of the decoder, and `resid_post encoder` at tokens of "
        "the prompt",
    ),
    "a transcoder of the encoder": (
        f"basis b = fit(transcoder(features: 4, k: 2), prompts: p, {QUICK}) at mlp_out encoder "
        "layer 1 at last token\n",
        "E0342",
        "a transcoder reconstructs the output of an MLP of the decoder, not `mlp_out encoder`",
    ),
    "edges at several positions": (
        f"circuit b = fit(eap(size: 3), prompts: p, with: zero, maximise: {MEASURE}) "
        "at subject token, token 2\n",
        "E0108",
        "together with a part of the prompt, for a circuit whose ablated edges are in the encoder",
    ),
    "edges of the encoder": (
        f"circuit b = fit(eap(size: 3), prompts: p, with: zero, maximise: {MEASURE}) "
        "at subject token\n",
        "E0108",
        "training a circuit in an encoder-decoder only at tokens of the encoder",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_training_that_is_not_computed_reports_its_reason(name: str, tmp_path: Path) -> None:
    line, code, reason = INVALID[name]
    edges = name.startswith("edges")
    rule = "ablate all but b at tokens * with zero" if edges else "observe features of b"
    joined = (rule, DIFFERENCE) if edges else (f"{rule} at last token",)
    lines = line + experiment("e", "prompts p", *joined)
    _, found = try_file(lines, tmp_path, model("t5"), None, tokenizer=tokenizer())
    problems = [each for each in found if each.severity == "error"]
    assert {each.code for each in problems} == {code}
    assert reason in problems[0].message


def test_training_and_its_use_in_parts_of_a_split_block(tmp_path: Path) -> None:
    """Rows of a block keep their numbers, and measured rows aren't training rows."""
    block = PROMPTS.replace("prompts p {", "prompts p {\n  split 50%")
    options = f"prompts: p.train, steps: 2, rate: 0.3, validation: 0%, maximise: {MEASURE}"
    where = Where("resid_post encoder layer 1", "last token")
    lines = f"direction d = fit(vector(length: 5), {options}) at {where.site} at {where.at}\n"
    lines += experiment("e", "prompts p.test", f"add d to {where.site} at {where.at}", DIFFERENCE)
    trained, [found] = train_and_run(tmp_path, lines, "bart", prompts=block)
    assert found.row_ids is not None
    for column, number in enumerate(found.row_ids):
        of = text(ROWS[number])
        write = where.write("bart", of, lambda own: apply_file("vector", trained, own, own))
        value = difference(logits("bart", of, [write]), ROWS[number])
        np.testing.assert_allclose(found.measures[0].patched[0, column], value, atol=3e-4)


@pytest.mark.parametrize(
    ("statement", "use"),
    [
        ("basis b = fit(sae(features: 4, k: 2)", "observe features of b at last token"),
        ("lens b = fit(tuned_lens", "observe tuned_lens(b) at resid_post layer * at last token"),
    ],
)
def test_streamed_rows_of_an_encoder_decoder_report_e0342(
    statement: str, use: str, tmp_path: Path
) -> None:
    lines = [f'{{"text": "w{n} w{n + 1} w3 w4"}}' for n in range(20)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    block = 'prompts texts { rows "texts.jsonl" streamed  template "{text}" }\n'
    text = f"{statement}, prompts: texts, steps: 2) at resid_post layer * at last token\n"
    text = text if "lens" in statement else text.replace("layer *", "layer 1")
    text = block + text + experiment("e", "prompts p", use)
    _, found = try_file(text, tmp_path, model("t5"), None, tokenizer=tokenizer())
    problems = [each for each in found if each.severity == "error"]
    assert [each.code for each in problems] == ["E0342"]
    assert "streamed rows of an encoder-decoder aren't read" in problems[0].message


@pytest.mark.parametrize(
    "line",
    [
        "basis f = fit(das(dims: 2), prompts: p, from: other, maximise: logit(answer), {}",
        "direction f = fit(vector(length: 3), prompts: p, maximise: logit(answer), {}",
        "basis f = fit(sae(features: 4, k: 2), prompts: p, {}",
    ],
)
def test_position_of_a_training_that_the_decoder_lacks_is_reported_once(
    line: str, tmp_path: Path
) -> None:
    """The training's experiment resolves the position too, at the same place of the file."""
    line = line.format("measure_on_training_rows: true) at mlp_out layer 1 at cue token\n")
    use = "add f to mlp_out layer 1 at last token"
    if line.startswith("basis"):
        use = "ablate feature 0 of f at last token with zero"
    text = line + experiment("e", "prompts p", use, DIFFERENCE)
    _, problems = try_file(text, tmp_path, model("t5"), tokenizer=tokenizer())
    (problem,) = (each for each in problems if each.severity == "error")
    assert problem.code == "E0316"
    assert problem.span is not None
    assert problem.span.written == "cue token"
