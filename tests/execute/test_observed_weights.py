"""Weight scores, against full matrices from slices of each family's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mechdsl.execute.observation.weights import (
    compute_positive_share,
    compute_singular_values,
    get_ov_factors,
    get_qk_factors,
    score_composition,
    score_copying,
    score_matching,
    score_successors,
)
from mechdsl.forward.hooks.weight_maps import NoLinearMap, WeightMaps

from .support import bare, shared

Array = NDArray[np.float64]
FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma", "gemma2")
PLACES = [(0, 3), (2, 1)]


@dataclass
class Parts:
    """The maps of one head, from rows, without biases and with the gains of norms."""

    q: Array
    k: Array
    v: Array
    o: Array


def numbers(parameter: Any) -> Array:
    return parameter.detach().double().numpy()


def centred(width: int) -> Array:
    return np.eye(width) - np.full((width, width), 1 / width)


def head(family: str, layer: int, number: int) -> Parts:
    model = bare(family)
    if family == "gpt2":
        block = model.transformer.h[layer]
        fused, d = numbers(block.attn.c_attn.weight), 24
        norm = centred(d) @ np.diag(numbers(block.ln_1.weight))
        cut = slice(6 * number, 6 * number + 6)
        q, k, v = (norm @ fused[:, part * d : part * d + d][:, cut] for part in range(3))
        return Parts(q, k, v, numbers(block.attn.c_proj.weight)[cut])
    if family == "gpt_neox":
        block = model.gpt_neox.layers[layer]
        fused = numbers(block.attention.query_key_value.weight).T
        norm = centred(24) @ np.diag(numbers(block.input_layernorm.weight))
        q, k, v = (norm @ fused[:, 18 * number + 6 * part :][:, :6] for part in range(3))
        return Parts(q, k, v, numbers(block.attention.dense.weight).T[6 * number :][:6])
    block = model.model.layers[layer]
    own = block.self_attn
    plus = 1.0 if family.startswith("gemma") else 0.0  # its norms multiply with 1 + weight
    norm = np.diag(numbers(block.input_layernorm.weight) + plus)
    q = norm @ numbers(own.q_proj.weight).T[:, 6 * number :][:, :6]
    k, v = (
        norm @ numbers(part.weight).T[:, 6 * (number // 2) :][:, :6]
        for part in (own.k_proj, own.v_proj)
    )
    o = numbers(own.o_proj.weight).T[6 * number :][:6]
    if family == "gemma2":
        o = o @ np.diag(numbers(block.post_attention_layernorm.weight) + 1)
    return Parts(q, k, v, o)


def ends(family: str) -> tuple[Array, Array]:
    """([vocabulary, d] embedding, [d, vocabulary] unembedding with the final norm's gain)."""
    model = bare(family)
    if family == "gpt2":
        final = centred(24) @ np.diag(numbers(model.transformer.ln_f.weight))
        return numbers(model.transformer.wte.weight), final @ numbers(model.lm_head.weight).T
    if family == "gpt_neox":
        final = centred(24) @ np.diag(numbers(model.gpt_neox.final_layer_norm.weight))
        return numbers(model.gpt_neox.embed_in.weight), final @ numbers(model.lm_head.weight).T
    plus = 1.0 if family.startswith("gemma") else 0.0
    final = np.diag(numbers(model.model.norm.weight) + plus)
    return numbers(model.model.embed_tokens.weight), final @ numbers(model.lm_head.weight).T


@cache
def maps(family: str) -> WeightMaps:
    return WeightMaps(shared(bare(family)))


def share(matrix: Array) -> float:
    values = np.linalg.eigvals(matrix)
    return float(values.real.sum() / np.abs(values).sum())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", PLACES)
def test_copying_and_matching_scores_equal_full_matrices(
    family: str, place: tuple[int, int]
) -> None:
    own, (embed, unembed) = head(family, *place), ends(family)
    ov, qk = embed @ own.v @ own.o @ unembed, embed @ own.q @ own.k.T @ embed.T
    assert np.isclose(score_copying(maps(family), *place), share(ov), atol=1e-4)
    assert np.isclose(score_matching(maps(family), *place), share(qk), atol=1e-4)
    assert abs(share(ov)) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_composition_of_two_heads_equals_full_matrices(family: str) -> None:
    first, then = head(family, *PLACES[0]), head(family, *PLACES[1])
    ov = first.v @ first.o
    reads = {"q": then.q @ then.k.T, "k": then.k @ then.q.T, "v": then.v @ then.o}
    for how, read in reads.items():
        wanted = np.linalg.norm(ov @ read) / np.linalg.norm(ov) / np.linalg.norm(read)
        assert np.isclose(score_composition(maps(family), how, *PLACES), wanted, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_singular_values_of_ov_and_qk_equal_full_matrices(family: str) -> None:
    own = head(family, *PLACES[1])
    for pair, whole in (
        (get_ov_factors(maps(family), *PLACES[1]), own.v @ own.o),
        (get_qk_factors(maps(family), *PLACES[1]), own.q @ own.k.T),
    ):
        wanted = np.linalg.svd(whole)[1]
        assert np.allclose(compute_singular_values(pair).numpy(), wanted[:6], atol=1e-4 * wanted[0])


def written(family: str, layer: int) -> Array:
    """[neuron, d]: contributions of neurons to the stream."""
    model = bare(family)
    if family == "gpt2":
        return numbers(model.transformer.h[layer].mlp.c_proj.weight)
    if family == "gpt_neox":
        return numbers(model.gpt_neox.layers[layer].mlp.dense_4h_to_h.weight).T
    block = model.model.layers[layer]
    found = numbers(block.mlp.down_proj.weight).T
    if family == "gemma2":
        return found * (numbers(block.post_feedforward_layernorm.weight) + 1)
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_neuron_vectors_and_logits_equal_the_parameters(family: str) -> None:
    wanted = written(family, 1)[5]
    assert np.allclose(maps(family).neurons(1)[5].numpy(), wanted, atol=1e-5)
    logits = maps(family).to_logits(maps(family).neurons(1)[5]).numpy()
    assert np.allclose(logits, wanted @ ends(family)[1], atol=1e-4 * np.abs(logits).max())


def behind_first_mlp(family: str, tokens: Array) -> Array:
    """[token, d]: embeddings after the first MLP, by the model's modules."""
    model = bare(family)
    if family == "gpt2":
        block = model.transformer.h[0]
        found = block.mlp(block.ln_2(model.transformer.wte.weight[tokens]))
    elif family == "gpt_neox":
        block = model.gpt_neox.layers[0]
        found = block.mlp(block.post_attention_layernorm(model.gpt_neox.embed_in.weight[tokens]))
    elif family == "gemma2":
        block = model.model.layers[0]
        vectors = model.model.embed_tokens(torch.from_numpy(tokens))
        found = block.mlp(block.pre_feedforward_layernorm(vectors))
        found = block.post_feedforward_layernorm(found)
    else:
        block = model.model.layers[0]
        vectors = model.model.embed_tokens(torch.from_numpy(tokens))
        found = block.mlp(block.post_attention_layernorm(vectors))
    return found.double().numpy()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", PLACES)
def test_successors_are_ranked_among_the_named_tokens(family: str, place: tuple[int, int]) -> None:
    """The last token equals the first, as with days of the week."""
    own, (_, unembed) = head(family, *place), ends(family)
    tokens = np.array([5, 9, 11, 20, 33, 40, 41, 46, 5])
    named = sorted(set(tokens.tolist()))
    vectors = behind_first_mlp(family, tokens[:-1])
    logits = (vectors @ own.v @ own.o @ unembed)[:, named]
    ranks = [
        1 + sum(row > row[named.index(then)])
        for row, then in zip(logits, tokens[1:].tolist(), strict=True)
    ]
    share, rank = score_successors(maps(family), *place, torch.from_numpy(tokens))
    assert np.isclose(share, np.mean([each == 1 for each in ranks]))
    assert np.isclose(rank, np.mean(ranks))
    assert 1 < rank < 8


@torch.no_grad()
def test_head_with_zero_output_has_no_successors(monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal logits, no token is first."""
    found = WeightMaps(shared(bare("gpt2")))
    monkeypatch.setattr(found, "out", lambda layer, head: torch.zeros(6, 24))
    assert score_successors(found, 1, 0, torch.tensor([5, 9, 11])) == (0.0, 2.0)


def test_positive_share_of_eigenvalues_equals_worked_examples() -> None:
    assert compute_positive_share(torch.eye(3)) == 1
    assert compute_positive_share(torch.diag(torch.tensor([3.0, -1.0]))) == 0.5
    assert abs(compute_positive_share(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))) < 1e-12
    assert np.isnan(compute_positive_share(torch.zeros(2, 2)))


@torch.no_grad()
def test_queries_with_a_norm_have_no_linear_map() -> None:
    """Queries have a norm after their projection."""
    with pytest.raises(NoLinearMap, match="`q` of layer 1"):
        maps("qwen3").query(1, 0)
    assert maps("qwen3").value(1, 0).shape == (20, 6)
