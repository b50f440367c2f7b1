"""Lenses on decoders of encoder-decoders, against the final norm and the unembedding of the bare
model, applied to vectors that plain hooks read."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.fits.reports import LensReport
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.passes import make_plan, plan_cost

from ..quick import some
from .encoder_decoders import (
    LAYERS,
    LIKE_T5,
    Text,
    changed,
    logits,
    model,
    name_of,
    place,
    read,
    starts,
    text,
    tokenizer,
    written,
    zeroed,
)
from .support import PROMPTS as BLOCK
from .support import (
    ROWS,
    Array,
    adopted,
    as_in_the_data,
    by_name,
    check_file,
    experiment,
    token,
    try_file,
    write_rows,
)

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

FAMILIES = ("t5", "mt5", "bart", "t5gemma", "mbart")
SITES = ("resid_post", "attn_out cross", "mlp_out", "resid_pre")
LOGIT = "measure logit(answer) as raw"


@cache
def biased(family: str) -> Any:
    """The model, with biases of the logits where its class has them."""
    made = copy.deepcopy(model(family))
    if hasattr(made, "final_logits_bias") and family == name_of(family):
        made.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    return made


@torch.no_grad()
def unembed(family: str, vectors: Tensor) -> Tensor:
    """Logits of vectors of the stream, by the formulas of the library."""
    made = biased(family)
    if name_of(family) in LIKE_T5:
        normed = made.decoder.final_layer_norm(vectors)
        factor = made.config.d_model**-0.5 if family in ("t5", "umt5") else 1
        return made.lm_head(normed * factor)
    if name_of(family) == "t5gemma":
        found = made.lm_head.out_proj(made.model.decoder.norm(vectors))
        cap = made.config.decoder.final_logit_softcapping
        return found if cap is None else cap * torch.tanh(found / cap)
    norm = getattr(made.model.decoder, "layer_norm", None)
    normed = vectors if norm is None else norm(vectors)
    return normed @ made.lm_head.weight.T + made.final_logits_bias[0]


def last_vector(family: str, site: str, layer: int, of: Text) -> Tensor:
    return read(family, of, place(family, site, layer))[len(starts(family)) - 1]


def run(family: str, lines: str, folder: Path) -> Any:
    return by_name(*try_file(lines, folder, biased(family), tokenizer=tokenizer()))


@pytest.mark.parametrize("family", some(FAMILIES, FAMILIES[:4]))
@pytest.mark.parametrize("site", some(SITES, SITES[:2]))
def test_logit_lens_equals_the_final_norm_and_the_unembedding(
    family: str, site: str, tmp_path: Path
) -> None:
    """T5 multiplies by d_model^-0.5, mT5 doesn't, and BART adds biases."""
    lens = f"observe logit_lens {site} layer * at last token"
    lines = experiment("e", "prompts p", lens, LOGIT)
    lines += experiment("f", "prompts p", f"{lens} as lens", "measure prob(answer) as raw")
    found = run(family, lines, tmp_path)
    for layer in range(LAYERS):
        for number, record in enumerate(ROWS):
            own = unembed(family, last_vector(family, site, layer, text(record)))
            wanted = float(own[token(record["a"])])
            np.testing.assert_allclose(
                found["e"].measures[0].patched[layer, number], wanted, atol=2e-4
            )
            chance = float(own.softmax(-1)[token(record["a"])])
            values = [each.patched[layer, number] for each in found["f"].measures]
            assert min(np.abs(np.array(values) - chance)) < 1e-4
    assert np.ptp(found["e"].measures[0].patched) > 0.1
    if site == "resid_post":
        outputs = found["e"].measures[0].patched[LAYERS - 1]
        with changed(model(family), []):
            plain = [logits(family, text(row))[-1, token(row["a"])] for row in ROWS]
        bias = getattr(biased(family), "final_logits_bias", torch.zeros(1, 10_000))[0]
        plain = [
            value + float(bias[token(row["a"])]) for value, row in zip(plain, ROWS, strict=True)
        ]
        np.testing.assert_allclose(outputs, plain, atol=2e-4)


@pytest.mark.parametrize("family", some(FAMILIES, ("bart",)))
def test_logit_lens_of_a_run_with_a_rule_in_the_encoder_equals_hooks(
    family: str, tmp_path: Path
) -> None:
    """Next to a second experiment, and as a change from the clean run."""
    rule = "ablate z encoder layer 1 head 1 at subject tokens with zero"
    lens = "observe logit_lens resid_post layer *"
    lines = experiment(
        "e", "prompts p", f"run without {{ {rule} }}", f"{lens} of without at last token", LOGIT
    )
    lines += experiment("f", "prompts p", f"{lens} at last token", LOGIT)
    found = run(family, lines, tmp_path)
    head = place(family, "z encoder", 1, 1)
    for number, record in enumerate(ROWS):
        of = text(record)
        for layer in range(LAYERS):
            seen: list[Tensor] = []

            def keep(value: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(value.clone())
                return value

            at = [len(starts(family)) - 1]
            writes = [zeroed(head, of.subject), (place(family, "resid_post", layer), at, keep)]
            logits(family, of, writes)
            value = float(unembed(family, seen[0][0])[token(record["a"])])
            given = found["e"].measures[0].patched[layer, number]
            np.testing.assert_allclose(given, value, atol=2e-4)
    assert np.abs(found["e"].measures[0].patched - found["f"].measures[0].patched).max() > 0.01


def divergence(own: Array, other: Array) -> float:
    """KL(p ‖ q) of two vectors of logits."""
    first, second = (torch.tensor(each).double().log_softmax(-1) for each in (own, other))
    return float((first.exp() * (first - second)).sum())


@pytest.mark.parametrize("family", some(FAMILIES, ("t5", "bart")))
def test_trained_lens_and_its_report_equal_hooks(family: str, tmp_path: Path) -> None:
    options = "prompts: p, steps: 20, batch: 4, rate: 0.05, validation: 25%"
    options += ", measure_on_training_rows: true"
    lines = f"lens l = fit(tuned_lens, {options}) at resid_post layer * at last token\n"
    lines += experiment(
        "e", "prompts p", "observe tuned_lens(l) at resid_post layer * at last token", LOGIT
    )
    write_rows(tmp_path)
    path = tmp_path / "file.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{BLOCK}\n{lines}', "utf-8")
    models = {"m": (biased(family), tokenizer())}
    [trained] = mechdsl.fit(path, models, store=tmp_path / "store")
    [found] = map(as_in_the_data, mechdsl.run(path, models, store=tmp_path / "store"))
    maps = load_file(next(trained.folder.glob("*.safetensors")))
    kept: list[list[list[float]]] = []
    for layer in range(LAYERS):
        both = []
        for number, record in enumerate(ROWS):
            own = last_vector(family, "resid_post", layer, text(record))
            moved = own
            if layer < LAYERS - 1:
                moved = own + maps[f"layer.{layer}.weight"] @ own + maps[f"layer.{layer}.bias"]
            value = float(unembed(family, moved)[token(record["a"])])
            given = found.measures[0].patched[layer, number]
            np.testing.assert_allclose(given, value, atol=2e-4)
            last = last_vector(family, "resid_post", LAYERS - 1, text(record))
            plain = unembed(family, last).numpy()
            both.append([divergence(plain, unembed(family, each).numpy()) for each in (moved, own)])
        kept.append(both)
    assert isinstance(trained.report, LensReport)
    for layer in range(LAYERS - 1):
        said = trained.report.trained[layer], trained.report.untrained[layer]
        assert min(np.abs(np.subtract(said, both)).max() for both in kept[layer]) < 1e-3
    assert np.abs(np.subtract(trained.report.trained, trained.report.untrained)).min() > 1e-3


INVALID = {
    "observe logit_lens resid_post encoder layer * at last token": (
        "E0207",
        "is in the encoder, but the unembedding reads only the decoder",
    ),
    "observe logit_lens v cross layer * head * at last token": (
        "E0207",
        "is not in the residual stream",
    ),
    "observe direct_logit attn_out layer * toward answer at last token": (
        "E0108",
        "which attends to the tokens of an encoder",
    ),
    "observe logit_lens resid_post layer * at subject tokens": ("E0316", "subject"),
}


@pytest.mark.parametrize("line", INVALID)
def test_lens_that_is_not_computed_reports_its_reason(line: str, tmp_path: Path) -> None:
    measure = () if "direct_logit" in line else (LOGIT,)
    lines = experiment("e", "prompts p", line, *measure)
    _, found = try_file(lines, tmp_path, model("t5"), None, tokenizer=tokenizer())
    problem = next(each for each in found if each.severity == "error")
    code, reason = INVALID[line]
    assert (problem.code, reason in problem.message) == (code, True), problem.message


@pytest.mark.parametrize("shared_by", ["a decoder after an encoder", "one stack"])
def test_plan_prices_the_unembedding_of_each_vector(shared_by: str, tmp_path: Path) -> None:
    """Two of its rows, if a measure reads two logits."""
    own = adopt_model("m", model("t5"), tokenizer())[0]
    own = adopted("gpt2") if shared_by == "one stack" else own
    assert own is not None
    write_rows(tmp_path)
    found = {}
    for name, lines in {
        "norm": ("observe norm resid_post layer * at last token",),
        "lens": ("observe logit_lens resid_post layer * at last token", LOGIT),
        "rank": (
            "observe logit_lens resid_post layer * at last token",
            "measure rank(answer) as raw",
        ),
    }.items():
        checked = check_file(experiment("e", "prompts p", *lines), tmp_path, own)
        found[name] = plan_cost(make_plan(checked.experiments))
    each = own.shape.n_layers * len(ROWS) * own.shape.d_model
    plain = {name: cost.plain.multiply_adds for name, cost in found.items()}
    assert plain["lens"] - plain["norm"] == plain["rank"] - plain["norm"]
    assert plain["lens"] - plain["norm"] == each * own.shape.vocab_size
    planned = {name: cost.planned.multiply_adds for name, cost in found.items()}
    assert planned["rank"] - planned["lens"] > each * (own.shape.vocab_size - 2)


@pytest.mark.parametrize("family", some(("bart writing", "t5 writing"), ("bart writing",)))
def test_logit_lens_of_replies_equals_hooks(family: str, tmp_path: Path) -> None:
    """The vector of each token of a reply, in a pass over the whole reply."""
    lines = experiment(
        "e",
        "prompts p",
        "generate 3",
        "observe logit_lens resid_post layer 1 at each reply token",
        LOGIT,
    )
    found = run(family, lines, tmp_path)["e"]
    own, first = place(family, "resid_post", 1), len(starts(family))
    compared = 0
    for number, record in enumerate(ROWS):
        of = text(record)
        reply = written(family, of, count=3)[0]
        seen: list[Tensor] = []

        def keep(value: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(value.clone())
            return value

        logits(family, of, [(own, list(range(first + len(reply))), keep)], reply)
        for step in range(len(reply)):
            value = float(unembed(family, seen[0][first + step])[token(record["a"])])
            np.testing.assert_allclose(found.measures[0].patched[step, number], value, atol=2e-4)
            compared += 1
    assert compared > 4
