"""Estimates, saved vectors and gradients, coordinates and controls in encoder-decoders, against
autograd and plain hooks on the bare model for one unpadded prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.execute import training

from ..quick import some
from .encoder_decoders import (
    ENCODER_LAYERS,
    HEADS,
    LAYERS,
    Place,
    Text,
    Write,
    changed,
    columns,
    difference,
    explicit_attention,
    logits,
    model,
    place,
    read,
    run,
    starts,
    text,
    tokenizer,
)
from .support import (
    DIFFERENCE,
    PROMPTS,
    ROWS,
    Record,
    as_in_the_data,
    experiment,
    token,
    try_file,
    write_rows,
)

FAMILIES = ("t5", "bart", "t5gemma")
SITES = ["z encoder", "resid_post", "v cross", "resid_post encoder", "z cross", "mlp_out", "z"]


def is_encoded(site: str) -> bool:
    """Whether the site has vectors at the encoder's tokens."""
    return "encoder" in site or site in ("k cross", "v cross")


def at(family: str, site: str, of: Text) -> int:
    return of.last if is_encoded(site) else len(starts(family)) - 1


def layers(family: str, site: str) -> list[Place]:
    """Whole vectors of each layer."""
    count = ENCODER_LAYERS if "encoder" in site else LAYERS
    return [place(family, site, layer) for layer in range(count)]


def of_cells(site: str, values: Tensor) -> list[float]:
    """Sums over the numbers of each cell of a layer: its heads, or all."""
    parts = values.unflatten(-1, (HEADS, -1)) if site[0] in "zkqv" else values[:, None]
    return parts.double().sum((0, 2)).tolist()


def axes(site: str) -> str:
    return "layer * head *" if site[0] in "zkqv" else "layer *"


def run_with_gradients(family: str, of: Text, writes: Sequence[Write], record: Record) -> Tensor:
    """The logit difference, as a tensor of autograd."""
    module = model(family)
    with torch.enable_grad(), changed(module, writes):
        found = module(
            input_ids=torch.tensor([of.ids]),
            decoder_input_ids=torch.tensor([starts(family)]),
            use_cache=False,
        )
    last = found.logits[0, -1].double()
    return last[token(record["a"])] - last[token(record["b"])]


def gradient(
    family: str, of: Text, own: Place, tokens: Sequence[int], record: Record, given: Tensor
) -> Tensor:
    """The gradient by the vectors of some tokens, [token, width], at the given vectors."""
    leaf = given.clone().requires_grad_()
    value = run_with_gradients(family, of, [(own, tokens, lambda _: leaf)], record)
    (found,) = torch.autograd.grad(value, leaf)
    return found


def vectors(family: str, of: Text, own: Place, tokens: Sequence[int]) -> Tensor:
    every = read(family, of, own)
    return every[list(tokens)]


ESTIMATES = {
    "gradient_input": DIFFERENCE,
    "integrated_gradients(steps: 3)": DIFFERENCE,
    "gradient": "measure logit(answer) - logit(wrong) as raw",
    "smoothgrad(samples: 2, noise: 0.00001)": "measure logit(answer) - logit(wrong) as raw",
}


def estimates(family: str, site: str, own: Place, record: Record) -> list[list[float]]:
    """Values of the cells of a layer, of each estimator."""
    base, other = text(record), text(record, "other")
    to, of = [at(family, site, base)], [at(family, site, other)]
    old, new = read(family, base, own)[to], read(family, other, own)[of]
    change = new - old
    slope = gradient(family, base, own, to, record, old)
    along = [
        gradient(family, base, own, to, record, old + (n + 0.5) / 3 * change) for n in range(3)
    ]
    size = np.sqrt(of_cells(site, slope**2)).tolist()
    first, mean = (of_cells(site, change * each) for each in (slope, torch.stack(along).mean(0)))
    return [first, mean, size, size]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", some(SITES, SITES[:3]))
def test_estimates_equal_autograd(family: str, site: str, tmp_path: Path) -> None:
    line = f"patch {site} {axes(site)} at last token"
    given = "prompts p", "from other into clean", line
    lines = "".join(
        experiment(f"e{number}", *given, measure, f"using {name}")
        for number, (name, measure) in enumerate(ESTIMATES.items())
    )
    found = run(family, lines, tmp_path)
    by_layer = [
        [estimates(family, site, own, record) for record in ROWS] for own in layers(family, site)
    ]  # layer, row, estimator, head
    expected = np.array(by_layer).transpose(2, 0, 3, 1)
    for number, wanted in enumerate(expected):
        measure = found[f"e{number}"].measures[0]
        given = measure.patched - (measure.base if number < 2 else 0)
        near = 1e-4 if number < 3 else 3e-3  # noise moves the gradient
        np.testing.assert_allclose(given, wanted.reshape(given.shape), rtol=near, atol=5e-5)
        assert np.abs(wanted).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stack", ["encoder", "cross", ""])
def test_gradient_times_attention_equals_autograd(family: str, stack: str, tmp_path: Path) -> None:
    keys = "subject tokens" if stack else "first token"
    line = f"block attention {stack} layer * heads * from last token to {keys}"
    measure = "measure logit(answer) - logit(wrong) as raw"
    lines = experiment(
        "e", "prompts p", " ".join(line.split()), measure, "using gradient_attention"
    )
    found = run(family, lines, tmp_path)["e"].measures[0].patched
    expected = []
    for layer in range(ENCODER_LAYERS if stack == "encoder" else LAYERS):
        row = []
        for record in ROWS:
            of, leaves = text(record), list[Tensor]()

            def keep(weights: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
                leaves.append(weights.detach().requires_grad_())
                return leaves[-1]

            with explicit_attention(family, stack, layer, weighed=keep):
                value = run_with_gradients(family, of, [], record)
            (slope,) = torch.autograd.grad(value, leaves)
            query = of.last if stack == "encoder" else len(starts(family)) - 1
            own = list(of.subject) if stack else [0]
            products = (leaves[0] * slope).clamp(min=0)[:, query, own]
            row.append(float(products.sum(-1).mean()))
        expected.append(row)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", some(SITES, SITES[:3]))
def test_saved_vectors_and_gradients_equal_autograd(family: str, site: str, tmp_path: Path) -> None:
    where = f"{site} {axes(site)} at last token"
    lines = experiment(
        "e",
        "prompts p",
        f"observe norm {where}",
        f'save {where} to "a.safetensors"',
        f'save gradient of logit(answer) - logit(wrong) by {where} to "b.safetensors"',
    )
    run(family, lines, tmp_path)
    saved, slopes = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert saved.keys() == slopes.keys()
    name = site.replace(" ", ".")
    for layer, own in enumerate(layers(family, site)):
        for number, row in enumerate(saved["row"].tolist()):
            of, record = text(ROWS[row]), ROWS[row]
            tokens = [at(family, site, of)]
            vectors = read(family, of, own)[tokens]
            wanted = gradient(family, of, own, tokens, record, vectors)
            heads = range(HEADS) if site[0] in "zkqv" else [None]
            for head in heads:
                key = f"{name}.layer{layer}" + ("" if head is None else f".head{head}")
                part = columns(Place(own.path, head=head), vectors.shape[-1])
                for given, every in ((vectors, saved), (wanted, slopes)):
                    near = 5e-5 * max(1.0, float(given.abs().max()))  # of T5Gemma's large vectors
                    np.testing.assert_allclose(
                        every[key][number].flatten(), given[0, part], atol=near
                    )


BASIS_SITES = [
    "resid_post encoder",
    "attn_out cross",
    "mlp_out",
    "z encoder",
    "z cross",
    "attn_out encoder",
    "resid_post",
]


def components(family: str, site: str, own: Place) -> tuple[Tensor, Tensor]:
    """Two principal components, [2, width], and the mean of the rows."""
    rows = [read(family, text(record), own)[at(family, site, text(record))] for record in ROWS]
    every = torch.stack(rows).double()
    _, _, directions = torch.linalg.svd(every - every.mean(0), full_matrices=False)
    return directions[:2], every.mean(0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", some(BASIS_SITES, BASIS_SITES[:3]))
def test_coordinates_of_principal_components_equal_hooks(
    family: str, site: str, tmp_path: Path
) -> None:
    """Two experiments and a saved basis of one file."""
    lines = f"basis b = pca(p, dims: 2) at {site} layer 1 at last token\n"
    patch = f"patch {site} layer 1 in basis b at last token"
    lines += experiment("e", "prompts p", "from other into clean", patch, DIFFERENCE)
    lines += experiment("f", "prompts p", "observe features of b at last token")
    lines += experiment(
        "g", "prompts p", f"ablate {site} layer 1 in basis b at last token with mean", DIFFERENCE
    )
    for name, steps in (("h", "gradient_input"), ("i", "integrated_gradients(steps: 3)")):
        given = "prompts p", "from other into clean", patch, DIFFERENCE
        lines += experiment(name, *given, f"using {steps}")
    found = run(family, lines, tmp_path)
    own = place(family, site, 1)
    directions, mean = components(family, site, own)
    patched, ablated, features = [], [], []
    estimated: dict[str, list[float]] = {"h": [], "i": []}
    for record in ROWS:
        base, other = text(record), text(record, "other")
        to, of = at(family, site, base), at(family, site, other)
        old, new = read(family, base, own)[to].double(), read(family, other, own)[of].double()
        features.append((directions @ (old - mean)).abs().tolist())
        step = (directions.T @ (directions @ (new - old)))[None].float()
        for name, parts in (("h", [0.0]), ("i", [1 / 6, 3 / 6, 5 / 6])):
            points = [old[None].float() + part * step for part in parts]
            slopes = [gradient(family, base, own, [to], record, each) for each in points]
            estimated[name].append(float((step * torch.stack(slopes).mean(0)).sum()))
        for vector, row in ((new, patched), (mean, ablated)):
            inserted = old + directions.T @ (directions @ (vector - old))

            def change(_: Tensor, inserted: Tensor = inserted) -> Tensor:
                return inserted.float()[None]

            row.append(difference(logits(family, base, [(own, [to], change)]), record))
    np.testing.assert_allclose(found["e"].measures[0].patched[0], patched, atol=2e-4)
    np.testing.assert_allclose(found["g"].measures[0].patched[0], ablated, atol=2e-4)
    for name, wanted in estimated.items():
        measure = found[name].measures[0]
        np.testing.assert_allclose((measure.patched - measure.base)[0], wanted, atol=2e-4)
    given = np.abs(found["f"].measures[0].patched)  # the sign of a component is arbitrary
    np.testing.assert_allclose(given, np.array(features).T, atol=1e-4)


OTHER_BASES = {
    "svd(weights: attn_out, dims: 2)": "the weights are those of the decoder's layers",
    'rows(unembed, "w3", "w4")': "the unembedding reads the decoder's residual stream",
    "jacobian(p, resid_post encoder layer 0 -> resid_post encoder layer 1, dims: 2)": "Jacobians",
    "fit(transcoder(features: 4, k: 2), prompts: p)": "the output of an MLP of the decoder",
}


@pytest.mark.parametrize("basis", OTHER_BASES)
def test_basis_of_the_decoder_at_an_encoder_site_reports_e0342(basis: str, tmp_path: Path) -> None:
    lines = f"basis b = {basis} at resid_post encoder layer 1 at last token\n"
    lines = lines.replace(" at last token", "") if "jacobian" not in basis else lines
    lines += experiment("e", "prompts p", "observe features of b at last token")
    _, found = try_file(lines, tmp_path, model("t5"), None, tokenizer=tokenizer())
    (problem,) = [each for each in found if each.severity == "error"]
    assert problem.code == "E0342"
    assert OTHER_BASES[basis] in problem.message


def test_singular_vectors_are_those_of_the_decoder(tmp_path: Path) -> None:
    lines = "basis b = svd(weights: attn_out, dims: 2) at attn_out layer 1\n"
    lines += experiment("f", "prompts p", "observe features of b at last token")
    found = run("bart", lines, tmp_path)["f"].measures[0].patched
    own = place("bart", "attn_out", 1)
    weight = model("bart").get_submodule(place("bart", "z", 1).path).weight.detach()
    directions = torch.linalg.svd(weight)[0][:, :2]
    expected = [
        read("bart", text(record), own)[at("bart", "attn_out", text(record))] @ directions
        for record in ROWS
    ]
    np.testing.assert_allclose(np.abs(found), torch.stack(expected).T.abs(), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["resid_post encoder", "z cross"])
def test_trainings_read_the_vectors_of_hooks_and_their_features_act(
    family: str, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features are those of the file that the training saves."""
    head = " head 1" if site == "z cross" else ""
    own = place(family, site, 1, 1 if head else None)
    token = "item" if site == "resid_post encoder" else "last"
    where = "item tokens" if token == "item" else "last token"
    given: list[Tensor] = []
    read_rows = training.read_rows

    def keep(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        found = read_rows(*args, **options)
        given.append(found[0])
        return found

    monkeypatch.setattr(training, "read_rows", keep)
    at_site = f"{site} layer 1{head}"
    options = "prompts: p, steps: 3, batch: 4, measure_on_training_rows: true"
    text_of = f"basis b = fit(sae(features: 6, k: 2), {options}) at {at_site} at {where}\n"
    text_of += experiment("f", "prompts p", "observe features of b at last token")
    write_rows(tmp_path)
    path = tmp_path / "file.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{PROMPTS}\n{text_of}', "utf-8")
    models = {"m": (model(family), tokenizer())}
    [trained] = mechdsl.fit(path, models, store=tmp_path / "store")
    [found] = map(as_in_the_data, mechdsl.run(path, models, store=tmp_path / "store"))
    expected = []
    for record in ROWS:
        of = text(record)
        tokens = of.items if token == "item" else [at(family, site, of)]
        expected += read(family, of, own)[list(tokens)].tolist()
    rows = np.array(sorted(torch.cat(given).tolist()))
    assert len(rows) == len(expected)
    np.testing.assert_allclose(rows, sorted(expected), atol=2e-5)
    weights = load_file(trained.folder / "sae_weights.safetensors")
    for number, record in enumerate(ROWS):
        of = text(record)
        vector = read(family, of, own)[at(family, site, of)]
        hidden = (vector - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        kept = torch.zeros_like(hidden)
        top = hidden.topk(2).indices
        kept[top] = hidden[top].clamp(min=0)
        np.testing.assert_allclose(found.measures[0].patched[:, number], kept, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_controls_equal_hooks_on_the_drawn_targets(family: str, tmp_path: Path) -> None:
    lines = "".join(
        experiment(name, "prompts p", "from other into clean", line, DIFFERENCE, against)
        for name, line, against in (
            ("layers", "patch resid_post encoder layer * at last token", "against random(1)"),
            ("heads", "patch z cross layer * head * at last token", "against random(1)"),
        )
    )
    results = run(family, lines, tmp_path)
    for name in ("layers", "heads"):
        measure, band = results[name].measures[0], results[name].control(0)
        effects = (measure.patched - measure.base).mean(1)
        others = effects.reshape(-1, 2)[:, ::-1].flatten()  # the only other layer, or head
        np.testing.assert_allclose(band.low, others, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(band.high, others, rtol=1e-3, atol=1e-4)


def test_controls_leave_out_layers_of_the_same_stack_only(tmp_path: Path) -> None:
    given = "prompts p", "from other into clean"
    lines = "".join(
        experiment(
            name,
            *given,
            "patch resid_post encoder layer 0 at last token",
            DIFFERENCE,
            f"against random(1) except {excluded}",
        )
        for name, excluded in (
            ("kept", "resid_post layer 1"),
            ("out", "resid_post encoder layer 1"),
        )
    )
    _, found = try_file(lines, tmp_path, model("t5"), None, tokenizer=tokenizer())
    (problem,) = [each for each in found if each.severity == "error"]
    assert problem.code == "E0630"
    assert problem.span is not None
    assert "experiment out" in problem.span.source.text[: problem.span.start]


OBJECTIVES = {
    "resid_post encoder layer 1": "subject tokens",
    "z cross layer 1 head 1": "last token",
    "v cross layer 0": "last token",
    "mlp_out layer 1": "last token",
}


@pytest.mark.parametrize(("family", "mode"), [("t5", "set"), ("bart", "add"), ("t5gemma", "set")])
@pytest.mark.parametrize("site", some(OBJECTIVES, tuple(OBJECTIVES)[:2]))
def test_objective_values_and_gradients_equal_autograd(
    site: str, family: str, mode: Any, tmp_path: Path
) -> None:
    """With a rule in the other stack, on prompts of different lengths."""
    name, at_text = site.partition(" layer ")[0], OBJECTIVES[site]
    numbers = [int(word) for word in site.split() if word.isdigit()]
    rule = "ablate z encoder layer 0 head 0 at last token with zero"
    rule = "scale resid_post layer 0 at last token by 0.5" if "encoder" in site else rule
    measure = "measure logit(answer) - logit(wrong) as raw"
    lines = experiment("e", "prompts p", rule, measure)
    write_rows(tmp_path)
    path = tmp_path / "file.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{PROMPTS}\n{lines}', "utf-8")
    models = {"m": (model(family), tokenizer())}
    objective = mechdsl.objective(path, models=models, site=site, at=at_text, mode=mode)
    random = torch.Generator().manual_seed(3)
    mine = objective.start + 0.3 * torch.randn(objective.shape, generator=random)
    theirs = mine.clone().requires_grad_()
    mine.requires_grad_()
    with torch.enable_grad():
        values = objective(mine)
        wanted = []
        for index, row in enumerate(objective.rows):
            of, own = text(ROWS[row]), place(family, name, *numbers)
            tokens = list(of.subject) if "subject" in at_text else [at(family, name, of)]
            first = len(of.ids) if not is_encoded(name) else 0
            assert objective.positions[index][: len(tokens)].tolist() == [
                first + token for token in tokens
            ]
            new = theirs[index, : len(tokens)]

            def change(old: Tensor, new: Tensor = new) -> Tensor:
                return old + new if mode == "add" else new

            half = place(family, "resid_post", 0), [len(starts(family)) - 1], lambda old: 0.5 * old
            none = place(family, "z encoder", 0, 0), [of.last], torch.zeros_like
            other = half if "encoder" in site else none
            wanted.append(run_with_gradients(family, of, [(own, tokens, change), other], ROWS[row]))
        (slope,) = torch.autograd.grad((values**2).sum(), mine)
        (expected,) = torch.autograd.grad((torch.stack(wanted) ** 2).sum(), theirs)
    np.testing.assert_allclose(values.detach(), torch.stack(wanted).detach(), atol=1e-4)
    np.testing.assert_allclose(slope, expected, atol=1e-4, rtol=1e-3)
    assert expected.abs().max() > 1e-3
