"""The convention `error of BASIS`: a dictionary's reconstruction error on vectors of rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import test_transcoders as transcoders
from .support import MANY, experiment, plain, rows, run_file, tokens
from .test_dictionaries import LAYER, make
from .test_inactive_features import BASIS, ran, width_of

KEPT, DROPPED, SOME = "rules keep it", "it is dropped", "some rules keep it"
ONE = "clamp feature 1 of f at last token to 2"
CASES = {
    "one position": (ONE, "last token", KEPT),
    "a sweep of features": ("ablate feature * of f at tokens * with zero", "tokens *", KEPT),
    "without error": (f"{ONE} without error", "last token", DROPPED),
    "reconstruction": (
        f"set resid_post layer {LAYER} at tokens * to reconstruction of f",
        "tokens *",
        DROPPED,
    ),
    "two rules": (
        f"clamp feature 1 of f at cue token to 2  {ONE} without error",
        "{cue token, last token}",
        SOME,
    ),
}


def mean_error(
    family: str, at: str, reconstruct: Callable[[str, int, int], Tensor], site: str = "resid_post"
) -> tuple[float, int]:
    """Mean of ‖x − x̂‖ / ‖x‖, and the number of vectors x.

    Args:
        reconstruct: From the model, the row and the token: x̂.
    """
    found: list[float] = []
    for n, text in enumerate(rows()):
        for token in tokens(text, at):
            x = plain(family, text)[site, LAYER][token, 0]
            found.append(float((x - reconstruct(family, n, token)).norm() / x.norm()))
    return sum(found) / len(found), len(found)


def check(said: str, error: float, count: int, kept: str) -> None:
    number, _, rest = said.partition(" of a vector's length, ")
    assert float(number) == pytest.approx(error, rel=5e-3)
    assert rest == f"the mean over {count} vectors of clean that rules change; {kept}"


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("architecture", ["standard", "topk", "layer_norm"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_reconstruction_error_of_autoencoders_equals_the_reference(
    family: str, architecture: str, mode: str, data: Path
) -> None:
    of = make(data, architecture, width_of(family))

    def reconstruct(name: str, n: int, token: int) -> Tensor:
        x = plain(name, rows()[n])["resid_post", LAYER][token, 0]
        return of.decode(of.encode(x), x)

    names = {key: f"e{number}" for number, key in enumerate(CASES)}
    text = BASIS + "".join(experiment(names[key], rule) for key, (rule, _, _) in CASES.items())
    found = run_file(text, data, family, mode)
    for key, (_, at, kept) in CASES.items():
        said = found[names[key]].conventions["error of f"]
        check(said, *mean_error(family, at, reconstruct), kept)


@pytest.mark.parametrize("kind", ["skip_transcoder", "sparsify"])
def test_reconstruction_error_of_a_transcoder_is_that_of_its_output(kind: str, data: Path) -> None:
    of = transcoders.make(data, kind, transcoders.width_of("llama"))

    def reconstruct(name: str, n: int, token: int) -> Tensor:
        x = plain(name, rows()[n])["mlp_norm", LAYER][token, 0]
        return of.decode(of.encode(x), x)

    rule = "clamp feature 1 of t at tokens * to 2"
    found = run_file(transcoders.BASIS + experiment("e", rule), data, "llama", "planned")["e"]
    expected = mean_error("llama", "tokens *", reconstruct, "mlp_out")
    check(found.conventions["error of t"], *expected, KEPT)


@pytest.mark.parametrize("verify", ["", " verify top 2"])
def test_reconstruction_error_of_an_estimate_is_at_its_sites(verify: str, data: Path) -> None:
    """No rule changes a vector, except in cells that `verify` runs."""
    of = make(data, "standard", width_of("llama"))
    rule = "ablate feature * of f at last token with zero"
    text = BASIS + experiment("e", rule, f"using gradient_input{verify}")
    found = run_file(text, data, "llama", "planned")["e"]

    def reconstruct(name: str, n: int, token: int) -> Tensor:
        x = plain(name, rows()[n])["resid_post", LAYER][token, 0]
        return of.decode(of.encode(x), x)

    error, count = mean_error("llama", "last token", reconstruct)
    number, _, rest = found.conventions["error of f"].partition(" of a vector's length, ")
    assert float(number) == pytest.approx(error, rel=5e-3)
    kept = KEPT if verify else "it is held fixed"
    assert rest == f"the mean over {count} vectors of clean at the rules' sites; {kept}"


def test_reconstruction_error_averages_over_the_layers_of_a_family(data: Path) -> None:
    of = make(data, "standard", width_of("llama"))
    text = 'basis f = sae("sae") at resid_post layer *\n'
    text += experiment("e", "clamp resid_post layer 0..1 in basis f at last token to 1")
    found = run_file(text, data, "llama", "planned")["e"]
    every: list[float] = []
    for text_of in rows():
        for layer in (0, 1):
            x = plain("llama", text_of)["resid_post", layer][text_of.last, 0]
            every.append(float((x - of.decode(of.encode(x), x)).norm() / x.norm()))
    check(found.conventions["error of f"], sum(every) / len(every), len(every), KEPT)


def test_stored_reconstruction_error_depends_on_rule_run_and_dictionary(data: Path) -> None:
    """A second run computes nothing and reports the same error."""
    make(data, "standard", width_of("gpt2"))
    store = data / "store"

    def said(text: str, kept: Path | None = store) -> tuple[str, int]:
        found, count = ran(text, data, kept)
        return found.conventions["error of f"], count

    text = experiment("e", ONE)
    first, _ = said(text)
    assert said(text) == (first, 0)
    for other in (
        experiment("e", ONE.replace("last", "cue")),
        experiment("e", ONE.replace("feature 1 of f", "resid_post layer 0 in basis f")),
        experiment("e", f"from other into turned  {ONE}"),
    ):
        again, count = said(other)
        assert again == said(other, None)[0]
        assert again != first
        assert count > 0
    path = data / "sae" / "sae_weights.safetensors"
    weights = load_file(path)
    weights["b_dec"] = torch.zeros_like(weights["b_dec"])
    save_file(weights, path)
    assert said(text)[0] == said(text, None)[0] != first


def test_linear_bases_report_no_reconstruction_error(data: Path) -> None:
    linear = "basis b = random(dims: 3) at resid_post layer 1\n"
    text = linear + experiment("e", "clamp feature 1 of b at last token to 2")
    found = run_file(text, data, "llama", "planned")["e"]
    assert not any(key.startswith("error of") for key in found.conventions)


IN_REPLIES = {
    "at each step": (ONE, "last token", KEPT),
    "all tokens": ("ablate feature 0..3 of f at tokens * with zero", "tokens *", KEPT),
    "first steps": (f"{ONE} during step 0..1", "last token", KEPT),
    "without error": (f"{ONE} without error", "last token", DROPPED),
}


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_reconstruction_error_of_experiments_with_replies_is_that_of_prompts(
    family: str, mode: str, data: Path
) -> None:
    of = make(data, "standard", width_of(family))

    def reconstruct(name: str, n: int, token: int) -> Tensor:
        x = plain(name, rows()[n])["resid_post", LAYER][token, 0]
        return of.decode(of.encode(x), x)

    names = {key: f"e{number}" for number, key in enumerate(IN_REPLIES)}
    length = "measure length as raw"
    text = BASIS + "".join(
        experiment(names[key], rule, "generate 3", measure=length)
        for key, (rule, _, _) in IN_REPLIES.items()
    )
    later = f"{ONE} during step 1..2"
    text += experiment("later", later, "generate 3", measure=length)
    found = run_file(text, data, family, mode)
    for key, (_, at, kept) in IN_REPLIES.items():
        said = found[names[key]].conventions["error of f"]
        assert "vectors of the prompts of clean" in said
        said = said.replace("the prompts of ", "")
        check(said, *mean_error(family, at, reconstruct), kept)
    assert "error of f" not in found["later"].conventions


def test_reconstruction_error_of_experiments_with_replies_is_stored(data: Path) -> None:
    make(data, "standard", width_of("gpt2"))
    text = experiment("e", ONE, "generate 3", measure="measure length as raw")
    first, count = ran(text, data, data / "store")
    assert count > 0
    again, _ = ran(text, data, data / "store")
    assert again.conventions["error of f"] == first.conventions["error of f"]
