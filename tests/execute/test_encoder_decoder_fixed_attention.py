"""`using atp_qk` and `atp_star` in encoder-decoders, against attention weights that are computed
explicitly from the projections of the bare model: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..quick import some
from .encoder_decoders import (
    ENCODER_LAYERS,
    HEADS,
    LAYERS,
    SHALLOW,
    Place,
    Text,
    Write,
    changed,
    explicit_attention,
    model,
    place,
    read,
    run,
    starts,
    text,
)
from .support import DIFFERENCE, ROWS, Record, experiment
from .test_encoder_decoder_circuits import fitted
from .test_encoder_decoder_gradients import of_cells, run_with_gradients
from .test_encoder_decoder_paths import (
    CASES,
    FROM,
    Case,
    Prompt,
    changed_senders,
    fixed,
    module_of,
    seen,
)
from .test_encoder_decoder_paths import constant as constant_vectors

FAMILIES = ("bart", "t5", "t5gemma", "mt5", "marian")
RAW = "measure logit(answer) - logit(wrong) as raw"
SITES = {
    "q encoder": "last token",
    "k encoder": "subject tokens",
    "q cross": "last token",
    "k cross": "subject tokens",
    "q": "last token",
    "k": "last token",
}
"""Site → position in the text that its stack reads, or in the decoder's tokens."""


def is_encoded(site: str) -> bool:
    return "encoder" in site or site in ("k cross", "v cross")


def stack_of(site: str) -> str:
    return site.partition(" ")[2]


def count_layers(family: str, stack: str) -> int:
    encoder = 1 if family in SHALLOW else ENCODER_LAYERS
    return encoder if stack == "encoder" else LAYERS


def tokens_of(family: str, site: str, of: Text) -> list[int]:
    if not is_encoded(site):
        return [len(starts(family)) - 1]
    return list(of.subject) if SITES.get(site) == "subject tokens" else [of.last]


Sublayer = tuple[str, int]


def paths_of(family: str, dropped: Sublayer) -> list[str]:
    """The modules whose outputs a layer of a stack adds to the stream."""
    stack, layer = dropped
    suffix = " encoder" if stack else ""
    names = [f"attn_out{suffix}", f"mlp_out{suffix}", *([] if stack else ["attn_out cross"])]
    return [place(family, name, layer).path for name in names]


@contextmanager
def constant(family: str, dropped: Sublayer | None) -> Generator[None]:
    """Let no gradient pass the outputs of attention and MLP of a layer."""

    def detach(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].detach(), *output[1:])
        return output.detach()

    with ExitStack() as stack:
        for path in [] if dropped is None else paths_of(family, dropped):
            hook = model(family).get_submodule(path).register_forward_hook(detach)
            stack.callback(hook.remove)
        yield


def weights(
    family: str,
    where: tuple[str, int],
    record: Record,
    writes: Sequence[Write] = (),
    dropped: Sublayer | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights of attention [head, query, key] of a layer, and the gradient by them.

    where: Stack and layer. dropped: The layer without a gradient.
    """
    leaves: list[Tensor] = []

    def keep(values: Tensor) -> Tensor:
        leaves.append(values.detach().requires_grad_())
        return leaves[-1]

    stack, layer = where
    with (
        changed(model(family), writes),
        explicit_attention(family, stack, layer, weighed=keep),
        constant(family, dropped),
    ):
        value = run_with_gradients(family, text(record), [], record)
    (slope,) = torch.autograd.grad(value, leaves)
    return leaves[0].detach(), slope


def estimate(
    family: str, site: str, layer: int, record: Record, dropped: Sublayer | None = None
) -> list[float]:
    """The exact change of the weights times the gradient by them, for each head."""
    base, other = text(record), text(record, "other")
    where, to = (stack_of(site), layer), tokens_of(family, site, base)
    found: list[float] = []
    now, slope = weights(family, where, record, (), dropped)
    for head in range(HEADS):
        own = place(family, site, layer, head)
        whole = read(family, other, Place(own.path))[tokens_of(family, site, other)]
        part = whole.unflatten(-1, (HEADS, -1))[:, head]
        new, _ = weights(family, where, record, [(own, to, lambda _, part=part: part)])
        found.append(float(((new - now) * slope).double().sum()))
    return found


def star(family: str, site: str, layer: int, record: Record) -> list[float]:
    """The mean over layers of absolute estimates without the gradient through the layer."""
    stacks = {"", "encoder" if stack_of(site) == "encoder" else ""}
    own = ("encoder" if stack_of(site) == "encoder" else "", layer)
    every = [
        (stack, n)
        for stack in stacks
        for n in range(count_layers(family, stack))
        if (stack, n) != own
    ]
    sizes = [np.abs(estimate(family, site, layer, record, dropped)) for dropped in every]
    return list(np.mean(sizes, axis=0))


def shown(family: str, sites: Sequence[str], using: str, folder: Path) -> list[np.ndarray]:
    """[cell, prompt] of each site; ragged prompts in one padded batch."""
    effect = RAW if using == "atp_star" else DIFFERENCE
    lines = "".join(
        experiment(
            f"e{n}",
            "prompts p",
            "from other into clean",
            f"patch {site} layer * head * at {SITES[site]}",
            effect,
            f"using {using}",
        )
        for n, site in enumerate(sites)
    )
    measures = [each.measures[0] for each in run(family, lines, folder).values()]
    return [each.patched - (0 if using == "atp_star" else each.base) for each in measures]


def compare_with(
    one: Callable[[str, str, int, Record], list[float]], family: str, site: str, found: Any
) -> Any:
    """Compare estimates at a site with those of a function for each layer and row, and return the
    latter."""
    layers = range(count_layers(family, stack_of(site)))
    every = [[one(family, site, layer, record) for record in ROWS] for layer in layers]
    expected = np.array(every).transpose(0, 2, 1)
    np.testing.assert_allclose(
        found, expected.reshape(found.shape), atol=2e-5, rtol=1e-3, err_msg=site
    )
    return expected


@pytest.mark.parametrize("family", some(FAMILIES, FAMILIES[:2]))
def test_atp_qk_in_each_stack_equals_exact_weights(family: str, tmp_path: Path) -> None:
    largest = 0.0
    for site, found in zip(SITES, shown(family, [*SITES], "atp_qk", tmp_path), strict=True):
        expected = compare_with(estimate, family, site, found)
        if stack_of(site) or family == "bart":  # other decoders have one token
            assert np.abs(expected).max() > 1e-3, site
        largest = max(largest, float(np.abs(expected).max()))
    assert largest > 0.05


@pytest.mark.parametrize("family", some(FAMILIES[:3], []))
def test_atp_star_of_queries_and_keys_leaves_out_each_layer(family: str, tmp_path: Path) -> None:
    """Of the encoder and the decoder for a site of the encoder, else of the decoder."""
    sites = [*SITES] if family == "bart" else [site for site in SITES if stack_of(site)]
    for site, found in zip(sites, shown(family, sites, "atp_star", tmp_path), strict=True):
        expected = compare_with(star, family, site, found)
        assert expected.max() > (1e-3 if stack_of(site) else 1e-4), site


def plain_star(family: str, site: str, layer: int, record: Record) -> list[float]:
    """The same at other sites: the change of the vector times the gradient by it."""
    base, other = text(record), text(record, "other")
    to, of = tokens_of(family, site, base), tokens_of(family, site, other)
    own = place(family, site, layer)
    old, new = read(family, base, own)[to], read(family, other, own)[of]
    stack = "encoder" if stack_of(site) == "encoder" else ""
    sizes: list[Any] = []
    for name in dict.fromkeys((stack, "")):
        for number in range(count_layers(family, name)):
            if (name, number) == (stack, layer) and not site.startswith("resid"):
                continue
            leaf = old.clone().requires_grad_()
            with constant(family, (name, number)):
                value = run_with_gradients(
                    family, base, [(own, to, lambda _, leaf=leaf: leaf)], record
                )
            (slope,) = torch.autograd.grad(value, leaf)
            sizes.append(np.abs(of_cells(site, (new - old) * slope)))
    return list(np.mean(sizes, axis=0))


PLAIN = {
    "z encoder": "layer * head *",
    "resid_post encoder": "layer *",
    "z cross": "layer * head *",
    "v cross": "layer * head *",
    "mlp_out": "layer *",
}


@pytest.mark.parametrize("family", some((*FAMILIES[:3], *SHALLOW), [*SHALLOW]))
def test_atp_star_at_other_sites_leaves_out_each_layer(family: str, tmp_path: Path) -> None:
    """Of the decoder only, for a site in the only layer of an encoder."""
    lines = "".join(
        experiment(
            f"e{n}",
            "prompts p",
            "from other into clean",
            f"patch {site} {axes} at last token",
            RAW,
            "using atp_star",
        )
        for n, (site, axes) in enumerate(PLAIN.items())
    )
    results = run(family, lines, tmp_path).values()
    for site, found in zip(PLAIN, results, strict=True):
        values = found.measures[0].patched
        expected = np.array(
            [
                [plain_star(family, site, layer, record) for record in ROWS]
                for layer in range(count_layers(family, stack_of(site)))
            ]
        ).transpose(0, 2, 1)
        np.testing.assert_allclose(
            values, expected.reshape(values.shape), atol=2e-5, rtol=1e-3, err_msg=site
        )
        assert expected.max() > 1e-3, site


def test_atp_star_of_values_of_two_layers_leaves_out_no_layer(tmp_path: Path) -> None:
    """No layer contains both sites; values from the encoder don't reach each other."""
    rule = "patch v cross layers 0..1 heads * at last token"
    lines = experiment("e", "prompts p", "from other into clean", rule, RAW, "using atp_star")
    found = run("bart", lines, tmp_path)["e"].measures[0].patched
    own, expected = [place("bart", "v cross", layer) for layer in (0, 1)], list[float]()
    for record in ROWS:
        base, other = text(record), text(record, "other")
        old = [read("bart", base, at)[[base.last]] for at in own]
        new = [read("bart", other, at)[[other.last]] for at in own]
        sizes: list[float] = []
        for dropped in range(LAYERS):
            leaves = [each.clone().requires_grad_() for each in old]
            writes: list[Write] = [
                (at, [base.last], lambda _, leaf=leaf: leaf)
                for at, leaf in zip(own, leaves, strict=True)
            ]
            with constant("bart", ("", dropped)):
                value = run_with_gradients("bart", base, writes, record)
            slopes = torch.autograd.grad(value, leaves, materialize_grads=True)
            parts = [(n - o) * s for n, o, s in zip(new, old, slopes, strict=True)]
            sizes.append(abs(float(sum(part.sum() for part in parts))))
        expected.append(float(np.mean(sizes)))
    np.testing.assert_allclose(found, [expected], atol=2e-5, rtol=1e-3)
    assert max(expected) > 1e-3


def along_edges(
    family: str, case: Case, record: Record, *, everywhere: bool = False
) -> list[float]:
    """The exact change of the weights by the queries or keys that a path gives, times the gradient
    by the weights, for each cell.

    Args:
        everywhere: Whether all tokens of the text change.
    """
    found: list[float] = []
    prompt = Prompt.of(family, record, encodes=case.encodes)
    if everywhere:
        every = range(len(prompt.base.ids if case.encodes else starts(family)))
        prompt = replace(prompt, read=tuple(every), written=tuple(every))
    for senders, receivers in case.cells():
        first = [
            *fixed(family, prompt.base, "", mlps=case.mlps),
            *changed_senders(family, prompt, senders),
        ]
        total = 0.0
        for site, layer in dict.fromkeys(end[:2] for end in receivers):
            writes: list[Write] = []
            for end in (each for each in receivers if each[:2] == (site, layer)):
                own = module_of(family, end)
                value = seen(family, prompt.base, first, own, prompt.written)
                writes.append((own, prompt.written, constant_vectors(value)))
            now, slope = weights(family, (stack_of(site), layer), record)
            new, _ = weights(family, (stack_of(site), layer), record, writes)
            total += float(((new - now) * slope).double().sum())
        found.append(total)
    return found


@pytest.mark.parametrize("family", some(("t5", "bart", "mt5", "t5gemma"), ("bart",)))
def test_atp_qk_of_edges_in_each_stack_equals_exact_weights(family: str, tmp_path: Path) -> None:
    names = ("cross to later queries", "encoder to its keys", "encoder to all keys")
    lines = "".join(
        experiment(f"e{n}", *FROM, *CASES[name].lines, "using atp_qk", DIFFERENCE)
        for n, name in enumerate(names)
    )
    found = run(family, lines, tmp_path)
    for n, name in enumerate(names):
        expected = np.transpose([along_edges(family, CASES[name], record) for record in ROWS])
        measure = found[f"e{n}"].measures[0]
        shown = measure.patched - measure.base
        np.testing.assert_allclose(shown, expected, atol=2e-5, rtol=1e-3, err_msg=name)
        assert np.abs(expected).max() > 1e-4, name


TO_KEYS = Case(
    "path mlp_out encoder layer 0 -> k cross layer 1 head * at subject token",
    lambda: [([("mlp_out encoder", 0, None)], [("k cross", 1, head)]) for head in range(HEADS)],
    encodes=True,
)


@pytest.mark.parametrize("family", some(("t5", "bart", "t5gemma"), ("t5",)))
def test_scores_of_edges_by_atp_qk_equal_exact_weights(family: str, tmp_path: Path) -> None:
    """Means over rows, in both stacks and in the attention between them."""
    found = fitted(family, "atp_qk(size: 30)", "from: other", "at tokens *", tmp_path)
    names = ("cross to later queries", "encoder to its keys")
    for case in (*(CASES[name] for name in names), TO_KEYS):
        expected = np.mean(
            [along_edges(family, case, record, everywhere=True) for record in ROWS], axis=0
        )
        ends = [[(*end[:2], end[2] or 0) for [end] in edge] for edge in case.cells()]
        shown = [found[of, to] for of, to in ends]
        np.testing.assert_allclose(shown, expected, atol=2e-5, rtol=1e-3, err_msg=case.line)
        assert np.abs(expected).max() > 1e-4, case.line
