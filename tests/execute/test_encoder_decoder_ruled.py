"""`using relp`, `gim` and `cdt` in encoder-decoders, against models whose modules have the changed
derivatives, and plain hooks, for one unpadded prompt."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.program.estimators import ESTIMATORS

from ..quick import in_turn, some
from ..reference.decomposed import decompose, decompose_held
from ..reference.gradients import Where
from ..reference.ruled import ruled
from .encoder_decoders import (
    HEADS,
    LAYERS,
    Place,
    Text,
    Write,
    changed,
    columns,
    model,
    place,
    read,
    run,
    starts,
    text,
    tokenizer,
)
from .support import DIFFERENCE, PROMPTS, ROWS, Record, by_name, experiment, token, try_file
from .test_encoder_decoder_gradients import at, axes, layers, of_cells
from .test_encoder_decoder_paths import (
    CASES,
    Case,
    End,
    Prompt,
    constant,
    fixed,
    module_of,
    plain,
    writes_of,
)

FAMILIES = ("t5", "bart", "t5gemma", "mt5")
KINDS = ("relp", "gim")
SITES = (
    "z encoder", "resid_post", "v cross", "resid_post encoder", "z cross", "mlp_out", "z",
    "k cross", "q encoder", "mlp_out encoder",
)  # fmt: skip
FROM = ("prompts p", "from other into clean", DIFFERENCE)


@cache
def double(family: str, kind: str = "") -> Any:
    module = copy.deepcopy(model(family)).double()
    return ruled(module, kind) if kind in KINDS else module


def measured(module: Any, family: str, of: Text, record: Record) -> Tensor:
    found = module(
        input_ids=torch.tensor([of.ids]),
        decoder_input_ids=torch.tensor([starts(family)]),
        use_cache=False,
    )
    last = found.logits[0, -1]
    return last[token(record["a"])] - last[token(record["b"])]


def estimate(family: str, kind: str, site: str, own: Place, record: Record) -> list[float]:
    """The change times the changed gradient, of each cell of a layer."""
    base, other = text(record), text(record, "other")
    to, of = [at(family, site, base)], [at(family, site, other)]
    old, new = (
        read(family, each, own)[tokens].double() for each, tokens in ((base, to), (other, of))
    )
    leaf, module = old.clone().requires_grad_(), double(family, kind)
    with torch.enable_grad(), changed(module, [(own, to, lambda _: leaf)]):
        value = measured(module, family, base, record)
    (slope,) = torch.autograd.grad(value, leaf)
    return of_cells(site, (new - old) * slope)


@pytest.mark.parametrize(("family", "kind"), in_turn(FAMILIES, KINDS, FAMILIES[:3]))
def test_relp_and_gim_equal_models_with_changed_derivatives(
    family: str, kind: str, tmp_path: Path
) -> None:
    lines = "".join(
        experiment(f"e{n}", *FROM, f"patch {site} {axes(site)} at last token", f"using {kind}")
        for n, site in enumerate(SITES)
    )
    found = run(family, lines, tmp_path)
    for n, site in enumerate(SITES):
        expected = np.array(
            [
                [estimate(family, kind, site, own, record) for record in ROWS]
                for own in layers(family, site)
            ]
        ).transpose(0, 2, 1)
        measure = found[f"e{n}"].measures[0]
        given = measure.patched - measure.base
        np.testing.assert_allclose(
            given, expected.reshape(given.shape), atol=1e-4, rtol=1e-3, err_msg=site
        )
        assert np.abs(expected).max() > 1e-3, site


DECOMPOSED = ["z encoder", "resid_post", "v cross", "resid_post encoder", "z cross", "mlp_out"]


def read_double(family: str, of: Text, own: Place, record: Record) -> Tensor:
    """[token, width]: what the model in 64 bits has at a place, unpatched."""
    module, found = double(family), list[Tensor]()

    def keep(_: Any, args: Any, output: Any) -> None:
        value = args[0] if own.of_input else output
        found.append((value if isinstance(value, Tensor) else value[0])[0].detach())

    module.get_submodule(own.path).register_forward_hook(keep)
    measured(module, family, of, record)
    return found[0]


def decomposed(family: str, site: str, own: Place, record: Record) -> list[float]:
    """The estimate of each cell of a layer."""
    base, other = text(record), text(record, "other")
    to, of = at(family, site, base), at(family, site, other)
    vector, units = read_double(family, other, own, record)[of], HEADS if site[0] in "zv" else 1
    where = Where(own.path, "in" if own.of_input else "out", units)
    parts, found = vector.unflatten(-1, (units, -1)), list[float]()
    for unit in range(units):

        def call(module: Any) -> Tensor:
            return measured(module, family, base, record)

        found.append(decompose(double(family), call, where, {(to, unit): parts[unit]}))
    return found


@pytest.mark.parametrize("family", some(FAMILIES, FAMILIES[:2]))
def test_cdt_equals_plain_hooks(family: str, tmp_path: Path) -> None:
    lines = "".join(
        experiment(f"e{n}", *FROM, f"patch {site} {axes(site)} at last token", "using cdt")
        for n, site in enumerate(DECOMPOSED)
    )
    # In 32 bits, shares of a bias have jumps where both parts of a number are near 0.
    ran = try_file(lines, tmp_path, double(family), tokenizer=tokenizer(), prompts=PROMPTS)
    found = by_name(*ran)
    for n, site in enumerate(DECOMPOSED):
        expected = np.array(
            [
                [decomposed(family, site, own, record) for record in ROWS]
                for own in layers(family, site)
            ]
        ).transpose(0, 2, 1)
        measure = found[f"e{n}"].measures[0]
        given = measure.patched - measure.base
        np.testing.assert_allclose(
            given, expected.reshape(given.shape), atol=1e-5, rtol=1e-4, err_msg=site
        )
        assert np.abs(expected).max() > 1e-3, site


# --- paths ----------------------------------------------------------------------------------------

STEPS = {"eap": 1, "relp": 1, "gim": 1, "eap_ig(steps: 3)": 3}


def moved(family: str, prompt: Prompt, part: float) -> list[Write]:
    """Move the stream that enters each stack from the source run toward the base run."""
    writes: list[Write] = []
    for site in ("resid_pre encoder", "resid_pre"):
        own = place(family, site, 0)
        base, source = (read(family, each, own) for each in (prompt.base, prompt.source))
        value = source + part * (base - source)
        writes.append((own, range(len(value)), constant(value)))
    return writes


def path_estimate(
    family: str,
    kind: str,
    case: Case,
    senders: Sequence[End],
    receivers: Sequence[End],
    row: Record,
) -> float:
    """The change of the senders times the gradient along the edges and after them."""
    prompt, module = Prompt.of(family, row, encodes=case.encodes), double(family, kind)
    others, base = writes_of(family, prompt.base, case.rule), prompt.base
    share = torch.zeros((), dtype=torch.float64, requires_grad=True)
    first = [*fixed(family, base, case.rule, mlps=case.mlps), *others]
    for site, layer, head in senders:
        whole = module_of(family, (site, layer, None))
        new = plain(family, prompt.source, whole)[list(prompt.read)].double()
        old = plain(family, base, whole, case.rule)[list(prompt.written)].double()
        part = columns(Place("", head=head), old.shape[-1])
        value = (old + share * (new - old))[:, part]
        own = module_of(family, (site, layer, head))
        first.append((own, prompt.written, lambda _, value=value: value))
    at_end = receivers[0][0] == "logits"
    ends = [("resid_post", LAYERS - 1, None)] if at_end else receivers
    places, received = [module_of(family, end) for end in ends], list[Tensor]()

    def keep(value: Tensor) -> Tensor:
        received.append(value)
        return value

    with (
        torch.enable_grad(),
        changed(module, [*first, *((p, prompt.written, keep) for p in places)]),
    ):
        measured(module, family, base, row)
    total = torch.zeros((), dtype=torch.float64)
    for point in range(STEPS[kind]):
        leaves = [torch.zeros_like(each, requires_grad=True) for each in received]
        adds: list[Write] = [
            (own, prompt.written, lambda value, leaf=leaf: value + leaf)
            for own, leaf in zip(places, leaves, strict=True)
        ]
        moves = moved(family, prompt, (point + 1) / STEPS[kind])
        with torch.enable_grad(), changed(module, [*moves, *adds]):
            value = measured(module, family, base, row)
        slopes = torch.autograd.grad(value, leaves)
        products = zip(received, slopes, strict=True)
        total = total + sum((one * slope).sum() for one, slope in products) / STEPS[kind]
    (found,) = torch.autograd.grad(total, share)
    return float(found)


QUICK = ("cross to logits", "cross to later queries", "encoder to its mlp", "encoder to all keys")
WITHOUT_RULES = tuple(name for name, case in CASES.items() if not case.rule)


@pytest.mark.parametrize(
    ("family", "kind", "names"),
    [
        ("t5", "gim", QUICK[:2]),
        ("t5", "eap_ig(steps: 3)", QUICK[2:3]),
        ("bart", "relp", QUICK[2:]),
        *(
            pytest.param(family, kind, WITHOUT_RULES, marks=pytest.mark.slow)
            for family in FAMILIES
            for kind in STEPS
        ),
    ],
)
def test_estimates_of_paths_equal_gradients_along_edges(
    family: str, kind: str, names: Sequence[str], tmp_path: Path
) -> None:
    cases = {name: CASES[name] for name in names}
    lines = "".join(
        experiment(f"e{n}", *FROM, case.line, f"using {kind}")
        for n, case in enumerate(cases.values())
    )
    found = run(family, lines, tmp_path)
    for n, (name, case) in enumerate(cases.items()):
        expected = [
            [path_estimate(family, kind, case, *cell, row) for row in ROWS] for cell in case.cells()
        ]
        measure = found[f"e{n}"].measures[0]
        np.testing.assert_allclose(
            measure.patched - measure.base, expected, atol=1e-4, rtol=1e-3, err_msg=name
        )
        assert np.abs(expected).max() > 1e-3, name


def place_of(family: str, end: End) -> Where:
    """The module of a site with all of its heads; for the end of the model, its last stream."""
    at_end = end[0] == "logits"
    own = module_of(family, ("resid_post", LAYERS - 1, None) if at_end else (*end[:2], None))
    return Where(own.path, "in" if own.of_input else "out", 1 if end[2] is None else HEADS)


def decomposed_path(
    family: str, case: Case, senders: Sequence[End], receivers: Sequence[End], row: Record
) -> float:
    """Hold all else at the whole up to the receivers, and then write what they receive."""
    prompt, module = Prompt.of(family, row, encodes=case.encodes), double(family)

    def call(module: Any) -> Tensor:
        return measured(module, family, prompt.base, row)

    sent: list[tuple[Where, dict[tuple[int, int], Tensor]]] = []
    for site, layer, head in senders:
        own = module_of(family, (site, layer, None))
        new = read_double(family, prompt.source, own, row)[prompt.read[0]]
        units, unit = (1, 0) if head is None else (HEADS, head)
        vector = new.unflatten(-1, (units, -1))[unit]
        sent.append((place_of(family, (site, layer, head)), {(prompt.written[0], unit): vector}))
    held = [
        Where(own.path, "in" if own.of_input else "out")
        for own, *_ in fixed(family, prompt.base, "", mlps=case.mlps)
    ]
    ends = [place_of(family, end) for end in receivers]
    _, found = decompose_held(module, call, sent, held, ends)
    at, heads = prompt.written[0], [end[2] or 0 for end in receivers]
    received = [
        (end, {(at, head): value[at, head]})
        for end, head, value in zip(ends, heads, found, strict=True)
    ]
    return decompose_held(module, call, received, (), ())[0]


DECOMPOSED_PATHS = (
    "cross to logits", "cross to inputs of mlps", "encoder to values", "mlps to values",
    "decoder to logits", "cross to logits through mlps", "encoder to its mlp",
    "embedding of the encoder to its blocks", "all heads of cross attention to logits",
    "encoder to its output",
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("t5", DECOMPOSED_PATHS[:2]),
        ("bart", DECOMPOSED_PATHS[2:4]),
        *(pytest.param(family, DECOMPOSED_PATHS, marks=pytest.mark.slow) for family in FAMILIES),
    ],
)
def test_cdt_of_paths_equals_plain_hooks(family: str, names: Sequence[str], tmp_path: Path) -> None:
    cases = {name: CASES[name] for name in names}
    lines = "".join(
        experiment(f"e{n}", *FROM, case.line, "using cdt") for n, case in enumerate(cases.values())
    )
    ran = try_file(lines, tmp_path, double(family), tokenizer=tokenizer(), prompts=PROMPTS)
    found = by_name(*ran)
    for n, (name, case) in enumerate(cases.items()):
        expected = [
            [decomposed_path(family, case, *cell, row) for row in ROWS] for cell in case.cells()
        ]
        measure = found[f"e{n}"].measures[0]
        limit = 1e-4 if family == "t5gemma" else 1e-5  # its norms compute in 32 bits
        np.testing.assert_allclose(
            measure.patched - measure.base, expected, atol=limit, rtol=1e-4, err_msg=name
        )
        assert np.abs(expected).max() > 1e-3, name


@pytest.mark.parametrize("name", KINDS)
def test_documentation_of_these_estimators_rejects_no_encoder_decoders(name: str) -> None:
    assert "ncoder-decoder" not in ESTIMATORS[name].documentation


@pytest.mark.parametrize("family", ["t5", "bart", pytest.param("mt5", marks=pytest.mark.slow)])
def test_estimates_of_paths_with_frozen_norms_equal_their_run(family: str, tmp_path: Path) -> None:
    """A path to the end with frozen norms is linear."""
    line = "path z cross layer * head * -> logits at last token with frozen norms"
    kinds = ("", "using eap", "using relp", "using gim")
    lines = "".join(
        experiment(f"e{n}", *FROM, line, *([kind] if kind else [])) for n, kind in enumerate(kinds)
    )
    first, *others = (each.measures[0] for each in run(family, lines, tmp_path).values())
    assert np.abs(first.patched - first.base).max() > 0.01
    for other in others:
        np.testing.assert_allclose(other.patched, first.patched, atol=1e-5)


def test_estimates_of_a_linear_model_equal_its_run(tmp_path: Path) -> None:
    """Without its last norm, logits are linear in what the last block adds to the stream."""
    module = copy.deepcopy(model("t5"))
    module.decoder.final_layer_norm = torch.nn.Identity()
    kinds = ("", "using relp", "using gim", "using cdt")
    rules = (
        "patch mlp_out layer 2 at last token",
        "ablate resid_post layer 2 at last token with zero",
    )
    lines = "".join(
        experiment(f"e{n}{m}", *FROM, rule, *([kind] if kind else []))
        for n, rule in enumerate(rules)
        for m, kind in enumerate(kinds)
    )
    found = by_name(*try_file(lines, tmp_path, module, tokenizer=tokenizer(), prompts=PROMPTS))
    for n in range(len(rules)):
        first, *others = (found[f"e{n}{m}"].measures[0] for m in range(len(kinds)))
        assert np.abs(first.patched - first.base).max() > 0.01
        for other in others:
            np.testing.assert_allclose(other.patched, first.patched, atol=1e-5)
