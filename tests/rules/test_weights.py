"""Rules on weights and edited models, against copies of the bare model with changed weights, one
unpadded prompt at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechdsl
from mechdsl.base.text import Source
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from ..execute.support import MODES, by_name, run_on, shared, token
from ..models import families
from ..quick import in_turn, some
from ..reference.forward import Write, forward
from .models import bare, double
from .support import (
    BLOCKS,
    Key,
    agree,
    codes,
    difference,
    experiment,
    plain,
    records,
    rows,
    run_file,
    try_file,
    unpatched,
)
from .test_generation import replies
from .test_steering import DIRECTION, difference_of_means, unit

FAMILIES = ("gpt2", "llama", "gpt_neox")
OUTPUTS = {
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers.{}.attention.dense", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
}
EMBEDDINGS = {
    "gpt2": ("transformer.wte", "transformer.wpe"),
    "gpt_neox": ("gpt_neox.embed_in",),
}


class ByHand:
    """A copy of a family's model in 64 bits, whose weights are changed in place."""

    def __init__(self, family: str, model: Any = None) -> None:
        self.family = family
        self.model = copy.deepcopy(double(family) if model is None else model)
        head = self.model.get_output_embeddings()  # which may be tied to the embedding
        head.weight = torch.nn.Parameter(head.weight.detach().clone())

    def output(self, site: str, layer: int) -> Any:
        paths = ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj")
        path = OUTPUTS.get(self.family, paths)[site == "mlp_out"]
        return self.model.get_submodule(path.format(layer))

    def weights(self, site: str, layer: int) -> Tensor:
        """[number, d_model], a view."""
        weight = self.output(site, layer).weight.detach()
        return weight if self.family == "gpt2" else weight.T

    def heads(self, *heads: int) -> list[int]:
        config = self.model.config
        count = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // count
        return [n for head in heads for n in range(head * width, (head + 1) * width)]

    def scale(self, site: str, layer: int, numbers: Sequence[int] | None, by: float) -> ByHand:
        own = self.weights(site, layer)
        own[slice(None) if numbers is None else list(numbers)] *= by
        return self

    def put(self, layer: int, neurons: Sequence[int], vector: Tensor) -> ByHand:
        self.weights("mlp_out", layer)[list(neurons)] = vector
        return self

    def add(self, layer: int, neurons: Sequence[int], vector: Tensor) -> ByHand:
        self.weights("mlp_out", layer)[list(neurons)] += vector
        return self

    def without(self, direction: Tensor) -> ByHand:
        u = unit(direction)
        for path in EMBEDDINGS.get(self.family, ("model.embed_tokens",)):
            weight = self.model.get_submodule(path).weight.detach()
            weight -= (weight @ u)[:, None] * u
        for layer in range(3):
            for site in ("attn_out", "mlp_out"):
                own, bias = self.weights(site, layer), self.output(site, layer).bias
                own -= (own @ u)[:, None] * u
                if bias is not None:
                    bias = bias.detach()
                    bias -= (bias @ u) * u
        return self

    def logits(self, ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([list(ids)])).logits[0]


@dataclass(frozen=True)
class Case:
    """Rules, the axes of their cells, and the edit of a model in each cell."""

    rule: str
    edit: Callable[..., ByHand]
    """From a model, the direction and the coordinates of the cell."""
    axes: tuple[str, ...] = ()
    cells: tuple[tuple[Any, ...], ...] = ((),)
    writing: bool = True
    """Whether the lines are valid in a model's block."""


CASES: dict[str, Case] = {
    "neurons": Case(
        "scale weights of mlp_out layer * neuron 0..3 by 0",
        lambda m, d, layer, n: m.scale("mlp_out", layer, [n], 0),
        ("layer", "neuron"),
        tuple((layer, n) for layer in range(3) for n in range(4)),
        False,
    ),
    "heads": Case(
        "scale weights of attn_out layer 1 head * by -0.5",
        lambda m, d, h: m.scale("attn_out", 1, m.heads(h), -0.5),
        ("head",),
        tuple((h,) for h in range(4)),
        False,
    ),
    "joined heads": Case(
        "scale weights of attn_out layer 2 heads 0, 3 by 2",
        lambda m, d: m.scale("attn_out", 2, m.heads(0, 3), 2),
    ),
    "sublayers": Case(
        "scale weights of attn_out layers 0..1 by 0.3",
        lambda m, d: m.scale("attn_out", 0, None, 0.3).scale("attn_out", 1, None, 0.3),
    ),
    "short name": Case("scale weights of L1N3 by 3", lambda m, d: m.scale("mlp_out", 1, [3], 3)),
    "short sublayer": Case(
        "scale weights of L2.mlp by 0.5", lambda m, d: m.scale("mlp_out", 2, None, 0.5)
    ),
    "head alone": Case(
        "scale weights of layer 0 head 2 by 0",
        lambda m, d: m.scale("attn_out", 0, m.heads(2), 0),
    ),
    "set": Case("set weights of L1N3 to 2 * d", lambda m, d: m.put(1, [3], 2 * d)),
    "set several": Case(
        "set weights of mlp_out layer 0 neurons 1..4 to d", lambda m, d: m.put(0, range(1, 5), d)
    ),
    "add": Case(
        "add 0.5 * d to weights of mlp_out layer 1 neurons 2, 5",
        lambda m, d: m.add(1, [2, 5], 0.5 * d),
    ),
    "add to each": Case(
        "add -1 * d to weights of mlp_out layer 2 neuron 2, 5",
        lambda m, d, n: m.add(2, [n], -d),
        ("neuron",),
        ((2,), (5,)),
        False,
    ),
    "by number": Case(
        "for c in [0, 0.5, 2] { scale weights of mlp_out layer 2 by c }",
        lambda m, d, c: m.scale("mlp_out", 2, None, c),
        ("c",),
        ((0,), (0.5,), (2,)),
        False,
    ),
    "set by number": Case(
        "for c in [0, 2] { set weights of L1N3 to c * d }",
        lambda m, d, c: m.put(1, [3], c * d),
        ("c",),
        ((0,), (2,)),
        False,
    ),
    "together": Case(
        "scale weights of L1N3 by 0\n  set weights of L1N4 to d\n"
        "  scale weights of attn_out layer 1 by 0.5\n  add d to weights of L2N0\n"
        "  project out d from weights",
        lambda m, d: (
            m.scale("mlp_out", 1, [3], 0)
            .put(1, [4], d)
            .scale("attn_out", 1, None, 0.5)
            .add(2, [0], d)
            .without(d)
        ),
    ),
    "added after": Case(
        "project out d from weights\n  add d to weights of L1N4",
        lambda m, d: m.without(d).add(1, [4], d),
    ),
}


def values(model: ByHand, run: str = "clean") -> list[float]:
    return [
        difference(model.logits(text.ids), record)
        for text, record in zip(rows(run), records(), strict=True)
    ]


def by_hand(family: str, case: Case) -> dict[Key, list[float]]:
    d = difference_of_means(family)
    return {cell: values(case.edit(ByHand(family), d, *cell)) for cell in case.cells}


@pytest.mark.parametrize(("family", "mode"), in_turn(FAMILIES, tuple(MODES)))
def test_weight_rules_equal_edited_reference_models(family: str, mode: str, data: Path) -> None:
    names = {key: f"e{number}" for number, key in enumerate(CASES)}
    text = DIRECTION + "".join(experiment(names[key], case.rule) for key, case in CASES.items())
    found = run_file(text, data, family, mode)
    for key, case in CASES.items():
        try:
            expected = by_hand(family, case)
            own, base = found[names[key]], unpatched(family)
            agree(own, case.axes, expected, base, most=False, large=1e-3)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


def run_models(
    text: str, data: Path, family: str, mode: str = "planned", **more: Any
) -> tuple[FileResult | None, list[Any]]:
    whole = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{DIRECTION}{text}'
    models = {"m": shared(bare(family)), **more}
    return run_on(Source(whole, data / "file.mech"), models, MODES[mode])


def of_model(model: str, *lines: str, name: str = "e", measure: str | None = None) -> str:
    own = experiment(name, *lines, measure=measure or "measure logit(answer) - logit(wrong) as raw")
    return own.replace("model m", f"model {model}")


def raw(found: ExperimentResult) -> np.ndarray:
    return found.measures[0].patched


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mode"), in_turn((*FAMILIES, "gemma2", "qwen3"), tuple(MODES), ["gpt2", "gemma2"])
)
def test_edited_models_equal_edited_reference_models(family: str, mode: str, data: Path) -> None:
    """All cases without a sweep, each as a model; gemma has norms after these weights."""
    projects = family in FAMILIES
    cases = {
        key: case
        for key, case in CASES.items()
        if case.writing and (projects or "project" not in case.rule)
    }
    text = "".join(
        f"model c{n} = m with {{\n  {case.rule}\n}}\n" for n, case in enumerate(cases.values())
    )
    text += "".join(of_model(f"c{n}", name=f"e{n}") for n in range(len(cases)))
    found = by_name(*run_models(text, data, family, mode))
    for number, (key, case) in enumerate(cases.items()):
        own = raw(found[f"e{number}"])[0]
        expected = np.array(by_hand(family, case)[()])
        close = np.abs(own - expected).max()
        assert close < 1e-4 * max(1, np.abs(expected).max()), (key, close)
        undone = family == "gemma2" and "sublayer" in key  # by the norm after them
        assert undone or np.abs(expected - unpatched(family)).max() > 1e-3, key
    base = values(ByHand(family))
    again = by_name(*run_models(of_model("m"), data, family))
    assert np.abs(raw(again["e"])[0] - base).max() < 1e-4


def test_group_of_a_sublayer_and_its_neuron_is_changed_once(data: Path) -> None:
    """Joined in a group, the whole sublayer is changed, once."""
    text = "group g = L1N5, L1.mlp\n" + experiment("e", "scale weights of g by 0.25")
    found = run_file(text, data, "llama", "planned")["e"]
    expected = values(ByHand("llama").scale("mlp_out", 1, None, 0.25))
    assert np.abs(raw(found)[0] - expected).max() < 1e-4


def test_edits_of_a_model_apply_in_order(data: Path) -> None:
    """In a model's block, each edit acts on the result of the preceding ones."""
    text = (
        "model c = m with {\n  add d to weights of L1N4\n  scale weights of L1N4 by 3\n"
        "  project out d from weights\n  set weights of L1N5 to 2 * d\n"
        "  scale weights of mlp_out layer 1 by 0.5\n}\n"
    )
    found = by_name(*run_models(text + of_model("c"), data, "llama"))
    d = difference_of_means("llama")
    model = ByHand("llama").add(1, [4], d).scale("mlp_out", 1, [4], 3).without(d)
    model.put(1, [5], 2 * d).scale("mlp_out", 1, None, 0.5)
    assert np.abs(raw(found["e"])[0] - values(model)).max() < 1e-4


# --- with other rules -----------------------------------------------------------------------------


def patched(model: ByHand, writes: Callable[[Any], Sequence[Write]]) -> list[float]:
    found: list[float] = []
    for text, record in zip(rows(), records(), strict=True):
        run = forward(model.family, model.model, text.ids, writes(text))
        found.append(difference(run.logits, record))
    return found


def neurons(layer: int, source: Tensor, at: int) -> list[Write]:
    """Writes of the first eight neurons."""
    return [Write("mlp_hidden", layer, source.flatten()[n : n + 1], at, n) for n in range(8)]


@pytest.mark.parametrize(("family", "mode"), in_turn(FAMILIES, tuple(MODES)))
def test_weight_rules_with_patches_equal_edited_reference_models(
    family: str, mode: str, data: Path
) -> None:
    """A patch of the neurons passes through the changed weights; one of the output doesn't."""
    others = dict(zip([text.words for text in rows()], rows("other"), strict=True))

    def source(text: Any, site: str) -> Tensor:
        other = others[text.words]
        return plain(family, other)[site, 1][other.last]

    rules = {
        "hidden": (
            "patch mlp_hidden layer 1 neurons 0..7 at last token",
            lambda text: neurons(1, source(text, "mlp_hidden"), text.last),
        ),
        "out": (
            "patch mlp_out layer 1 at last token",
            lambda text: [Write("mlp_out", 1, source(text, "mlp_out"), text.last)],
        ),
    }
    text, expected = DIRECTION, {}
    edits = {
        "scaled": (
            "scale weights of mlp_out layer 1 by -1",
            lambda m, d: m.scale("mlp_out", 1, None, -1),
        ),
        "set": (
            "set weights of mlp_out layer 1 neurons 2..4 to d",
            lambda m, d: m.put(1, range(2, 5), d),
        ),
    }
    for name, (rule, write) in rules.items():
        for kind, (edit, change) in edits.items():
            model = change(ByHand(family), difference_of_means(family))
            expected[f"{name}_{kind}"] = patched(model, write)
            text += experiment(f"{name}_{kind}", "from other into clean", edit, rule)
    found = run_file(text, data, family, mode)
    for name, own in expected.items():
        assert np.abs(raw(found[name])[0] - own).max() < 2e-4, name
    assert np.abs(np.subtract(expected["hidden_scaled"], expected["out_scaled"])).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_derived_runs_with_weight_rules_equal_the_reference(family: str, data: Path) -> None:
    """Activations of a run with other weights, patched into the clean run; and rules on it."""
    edit = "scale weights of mlp_out layer 0 by 0.2"
    model = ByHand(family).scale("mlp_out", 0, None, 0.2)
    text = experiment(
        "into",
        f"run hurt {{ {edit} }}",
        "from hurt into clean",
        "patch resid_post layer 1 at last token",
    )
    text += experiment(
        "back",
        f"run hurt {{ {edit} }}",
        "from clean into hurt",
        "patch mlp_hidden layer 0 neurons 0..7 at last token",
        measure="measure logit(answer) - logit(wrong) as raw",
    )
    found = run_file(text, data, family, "planned")
    expected = []
    for own, record in zip(rows(), records(), strict=True):
        vector = forward(family, model.model, own.ids)["resid_post", 1][own.last]
        run = forward(family, double(family), own.ids, [Write("resid_post", 1, vector, own.last)])
        expected.append(difference(run.logits, record))
    assert np.abs(raw(found["into"])[0] - expected).max() < 1e-4

    def clean(own: Any) -> Sequence[Write]:
        return neurons(0, plain(family, own)["mlp_hidden", 0][own.last], own.last)

    assert np.abs(raw(found["back"])[0] - patched(model, clean)).max() < 1e-4


LONG = """
prompts long {
  rows "data.jsonl"
  xs = list(item, from: words, sep: " ")
  template "{xs} w40 {subject} w41 {cue} w42"
  answer " {a} w7 {b}"
}
"""


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("mode", ["plain", "planned"])
def test_weight_rules_act_at_multi_token_answers(family: str, mode: str, data: Path) -> None:
    """The weights are changed at the answer's tokens, too."""
    rules = {
        "scaled": "scale weights of mlp_out layer 1 by 0",
        "set": "set weights of mlp_out layer 0 neurons 1..4 to d",
        "out": "project out d from weights",
    }
    d = difference_of_means(family)
    models = {
        "scaled": ByHand(family).scale("mlp_out", 1, None, 0),
        "set": ByHand(family).put(0, range(1, 5), d),
        "out": ByHand(family).without(d),
    }
    text = LONG + DIRECTION + "".join(
        experiment(name, rule, block="long", measure="measure logprob(answer) as raw")
        for name, rule in rules.items()
    )  # fmt: skip
    found = run_file(text, data, family, mode)
    for name, model in models.items():
        expected: list[float] = []
        for own, record in zip(rows(), records(), strict=True):
            answer = [token(record["a"]), token("w7"), token(record["b"])]
            logits = model.logits([*own.ids, *answer[:-1]]).log_softmax(-1)[-3:]
            expected.append(float(sum(logits[n, at] for n, at in enumerate(answer))))
        assert np.abs(raw(found[name])[0] - expected).max() < 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_rules_during_generation_equal_edited_models(family: str, data: Path) -> None:
    """Replies of a run with weight rules equal those of a model with these weights."""
    d = difference_of_means(family)
    rules = {
        "scaled": ("scale weights of mlp_out layer 1 by -2",
                   ByHand(family).scale("mlp_out", 1, None, -2)),
        "added": ("add 3 * d to weights of mlp_out layer 0 neurons 1..9",
                  ByHand(family).add(0, range(1, 10), 3 * d)),
        "out": ("project out d from weights", ByHand(family).without(d)),
    }  # fmt: skip
    text, edits = "", ""
    for name, (rule, _) in rules.items():
        edits += f"model of_{name} = m with {{\n  {rule}\n}}\n"
        for model, own in (("m", (rule,)), (f"of_{name}", ())):
            own = (*own, "generate 5")
            text += of_model(model, *own, name=f"{name}_{model}", measure="measure length as raw")
    found = by_name(*run_models(edits + text, data, family))
    unchanged = greedy(ByHand(family))
    for name, (_, model) in rules.items():
        expected = greedy(model)
        assert expected != unchanged
        assert replies(found[f"{name}_m"]) == expected, name
        runs = found[f"{name}_of_{name}"].replies.runs["clean"]
        assert [list(own[0].ids) for _, own in sorted(runs.items())] == expected, name


def greedy(model: ByHand) -> list[list[int]]:
    """[row] five tokens."""
    found: list[list[int]] = []
    for text in rows():
        ids = list(text.ids)
        for _ in range(5):
            ids.append(int(model.logits(ids)[-1].argmax()))
        found.append(ids[-5:])
    return found


OTHERS = ("falcon", "gptj", "bloom", "olmo", "phi3", "mpt", "granite")
"""Families of other structures: parallel blocks, fused projections, other classes of maps, and
factors after the sublayers."""


def granite() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    more = {"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "pad_token_id": None}
    config = AutoConfig.for_model("granite", **families.CONFIGS["llama"], **more)
    model = AutoModelForCausalLM.from_config(config)
    families.draw(model, 0)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", some(OTHERS, ["falcon", "phi3"]))
def test_weight_rule_equals_an_edited_model_in_other_structures(family: str, data: Path) -> None:
    """The rule changes activations in hooks, the edited model changes parameters."""
    lines = (
        "scale weights of attn_out layer 1 head 1 by -1",
        "scale weights of mlp_out layer 1 by 0.3",
        "set weights of mlp_out layer 0 neurons 1..3 to 2 * d",
        "add d to weights of L1N4",
    )
    text = "".join(
        f"model c{n} = m with {{ {line} }}\n"
        + of_model(f"c{n}", name=f"of_model{n}")
        + of_model("m", line, name=f"of_rule{n}")
        for n, line in enumerate(lines)
    )
    whole = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{DIRECTION}{text}'
    text = whole + of_model("m", name="plain")
    models = {"m": shared(granite() if family == "granite" else families.module(family))}
    found = by_name(*run_on(Source(text, data / "file.mech"), models, MODES["planned"]))
    for number, line in enumerate(lines):
        rule, model = (raw(found[f"of_{kind}{number}"]) for kind in ("rule", "model"))
        assert np.abs(rule - model).max() < 1e-4 * max(1, np.abs(model).max()), line
        assert np.abs(rule - raw(found["plain"])).max() > 1e-4, line


# --- sums of models -------------------------------------------------------------------------------


def other_weights(family: str) -> Any:
    """A model of the same sizes with perturbed weights, as after further training."""
    model = copy.deepcopy(bare(family))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=random)
    return model


SUMS = {
    "half": ("m + 0.5 * (t - m)", 0.5, 0.5),
    "beyond": ("m + 2 * (t - m)", -1.0, 2.0),
    "back": ("m - (t - m) / 2", 1.5, -0.5),
    "mean": ("(m + t) * 0.5", 0.5, 0.5),
    "by number": ("m + c * (t - m)", 0.75, 0.25),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_of_models_equal_the_reference(family: str, data: Path) -> None:
    other = other_weights(family)
    text = 'param c = 0.25\nmodel t = local("handed over")\n'
    text += "".join(f"model s{n} = {how}\n" for n, (how, *_) in enumerate(SUMS.values()))
    text += "model c0 = s0 with { scale weights of L1N3 by 0 }\n"
    text += "".join(of_model(f"s{n}", name=f"e{n}") for n in range(len(SUMS)))
    text += of_model("c0", name="edited")
    found = by_name(*run_models(text, data, family, t=shared(other)))
    expected: dict[str, list[float]] = {}
    for number, (name, (_, first, second)) in enumerate(SUMS.items()):
        whole = copy.deepcopy(double(family))
        weights = dict(copy.deepcopy(other).double().named_parameters())
        with torch.no_grad():
            for key, parameter in whole.named_parameters():
                parameter.copy_(first * parameter + second * weights[key])
        expected[name] = values(ByHand(family, whole))
        assert np.abs(raw(found[f"e{number}"])[0] - expected[name]).max() < 1e-3, name
        if not number:
            edited = values(ByHand(family, whole).scale("mlp_out", 1, [3], 0))
            assert np.abs(raw(found["edited"])[0] - edited).max() < 1e-3
    assert expected["half"] == expected["mean"]
    assert np.abs(np.subtract(expected["half"], expected["beyond"])).max() > 0.1


def test_sum_of_models_of_different_shapes_is_an_error(data: Path) -> None:
    text = 'model t = local("handed over")\nmodel s = m + 0.5 * (t - m)\n' + of_model("s")
    result, found = run_models(text, data, "llama", t=shared(bare("gpt2")))
    assert result is None
    problem = next(each for each in found if each.severity == "error")
    assert problem.code == "E0457"
    assert "differ" in problem.message


# --- rounded weights ------------------------------------------------------------------------------


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """[output, input] one output at a time."""
    rows: list[torch.Tensor] = []
    for row in weight.double():
        scale = row.abs().max() / (2 ** (bits - 1) - 1)
        rows.append(torch.round(row / scale) * scale if scale else row)
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_rounded_models_equal_the_reference(family: str, data: Path) -> None:
    """Also under edits, in a sum, and next to a model with other bits; the base is unchanged."""
    text = "param bits = 4\nmodel q = rounded(m, bits: bits)\nmodel fine = rounded(m, bits: 12)\n"
    text += "model half = m + 0.5 * (q - m)\nmodel c = q with { scale weights of L1N3 by 0 }\n"
    names = ("q", "fine", "half", "c", "m")
    text += "".join(of_model(name, name=f"e_{name}") for name in names)
    found = by_name(*run_models(text, data, family))
    whole = {bits: copy.deepcopy(double(family)) for bits in (4, 12)}
    mixed = copy.deepcopy(double(family))
    with torch.no_grad():
        for bits, model in whole.items():
            for path, part in model.named_modules():
                block = any(f".{n}." in f".{path}." for n in range(3))
                transposed = type(part).__name__ == "Conv1D"
                if block and (transposed or isinstance(part, torch.nn.Linear)):
                    own = part.weight.T if transposed else part.weight
                    new = rounded(own.float(), bits)
                    part.weight.copy_(new.T if transposed else new)
        for key, parameter in mixed.named_parameters():
            parameter.copy_((parameter + dict(whole[4].named_parameters())[key]) / 2)
    expected = {
        "q": values(ByHand(family, whole[4])),
        "fine": values(ByHand(family, whole[12])),
        "half": values(ByHand(family, mixed)),
        "c": values(ByHand(family, whole[4]).scale("mlp_out", 1, [3], 0)),
        "m": values(ByHand(family, double(family))),
    }
    for name, wanted in expected.items():
        assert np.abs(raw(found[f"e_{name}"])[0] - wanted).max() < 1e-3, name
    for name in ("q", "half", "c"):
        assert np.abs(np.subtract(expected[name], expected["m"])).max() > 0.05, name


BAD_ROUNDING = {
    "rounded(m)": "`rounded` needs a number of bits",
    "rounded(bits: 4)": "`rounded` needs the model whose weights are rounded",
    "rounded(m, bits: 1)": "`bits` must be a whole number of bits",
    "rounded(m, bits: 17)": "`bits` must be a whole number of bits",
    "rounded(m, bits: 4.0)": "`bits` must be a whole number of bits",
    "rounded(m, bits: true)": "`bits` must be a whole number of bits",
    "rounded(m, 4)": "`rounded` has an invalid argument `4`",
    "rounded(m, bits: 4, group: 8)": "`rounded` has an invalid argument `group: 8`",
    'rounded(zoo("worked"), bits: 4)': "`rounded` rounds the weights of a model of the file",
}


@pytest.mark.parametrize("source", BAD_ROUNDING)
def test_invalid_rounding_is_an_error(source: str, data: Path) -> None:
    _, found = run_models(f"model q = {source}\n" + of_model("q"), data, "llama")
    errors = [each for each in found if each.severity == "error"]
    assert (errors[0].code, errors[0].message) == ("E0207", BAD_ROUNDING[source])


def test_rounding_a_model_with_experts_is_an_error(data: Path) -> None:
    _, found = run_models("model q = rounded(m, bits: 4)\n" + of_model("q"), data, "gpt_oss")
    (problem,) = [each for each in found if each.severity == "error"]
    assert problem.code == "E0344"
    assert "not of a linear map" in problem.message


def test_store_distinguishes_rounded_models_by_bits(data: Path) -> None:
    head = f'mech 1\nmodel m = zoo("counting")\n{ZOO}'
    every = [
        mechdsl.run(f"{head}model q = rounded(m, bits: {n})\n" + of_counting("q"), store=data / "s")
        for n in (4, 5, 4)
    ]
    first, second, again = ([float(v) for v in raw(own["e"])[0]] for own in every)
    assert first == again != second


# --- store ----------------------------------------------------------------------------------------


def test_store_distinguishes_edited_models(data: Path) -> None:
    """With a store, each change of an edit, a factor or a direction gives other values."""
    head = f'mech 1\nmodel m = zoo("counting")\n{ZOO}'
    lines = (
        "scale weights of L1N3 by 0",
        "scale weights of L1N3 by 2",
        "set weights of L1N3 to 3 * d",
        "set weights of L1N3 to 3 * f",
        "set weights of L1N3 to 4 * d",
        "add 3 * d to weights of L1N3",
        "project out d from weights",
    )

    def patched(text: str) -> list[float]:
        result = mechdsl.run(head + text, store=data / "store")
        return [float(value) for value in result["e"].measures[0].patched[0]]

    edited = {line: f"model c = m with {{ {line} }}\n{of_counting('c')}" for line in lines}
    found = {line: patched(text) for line, text in edited.items()}
    for line in lines[::3]:  # one that scales, one that sets, one that projects
        assert patched(edited[line]) == found[line]
        rule = patched(of_counting("m", line))
        assert np.abs(np.subtract(found[line], rule)).max() < 1e-4, line
    for line, other in combinations(lines, 2):
        assert found[line] != found[other], (line, other)


def test_stored_run_depends_on_rows_of_a_direction_in_an_edit(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If rows that only an edit reads change, the run isn't a cache hit."""
    monkeypatch.chdir(data)
    text = (
        'mech 1\nmodel m = zoo("counting")\n'
        "model c = m with { add 4 * d to weights of mlp_out layer 1 neurons 0..40 }\n"
        'prompts train { rows "train.jsonl" template "{long}" corrupt fewer { long = short } }\n'
        "direction d = mean_difference(train, train.fewer) at resid_post layer 1 at last token\n"
        'prompts parts { a in 3..9 template "Part 1: apple {a} Count 1:" answer " {a}" }\n'
        "experiment e { model c prompts parts limit 5 measure logit(answer) as raw }\n"
    )
    Path("file.mech").write_text(text, encoding="utf-8")
    found: list[np.ndarray] = []
    for item in ("apple", "pear", "apple"):
        texts = {"long": f"Part 1: {item} {item} Count 1:", "short": f"Part 1: {item} Count 1:"}
        Path("train.jsonl").write_text(json.dumps(texts) + "\n", encoding="utf-8")
        found.append(mechdsl.run("file.mech", store="store")["e"].measures[0].patched)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert np.array_equal(found[0], found[2])


ZOO = """
prompts parts {
  a in 3..9
  item in ["apple", "pear", "plum"]
  part1 = list(item, a, sep: " ")
  template "Part 1: {part1} Count 1:"
  answer " {a}"
  corrupt fewer { a = a - 1 }
}
direction d = mean_difference(parts, parts.fewer) at resid_post layer 1 at last token
direction f = mean_difference(parts, parts.fewer) at resid_post layer 2 at last token
"""


def of_counting(model: str, *lines: str) -> str:
    rule = "ablate attn_out layer 2 at token 2 with zero"  # its values are stored
    body = "\n".join(("", f"model {model}", "prompts parts limit 6", *lines, rule))
    return f"experiment e {{{body}\nmeasure logit(answer) as raw\n}}\n"


def test_explain_lists_edits_and_sums() -> None:
    head = f'mech 1\nmodel m = zoo("counting")\n{ZOO}'
    models = (
        "model c = m with {\n  scale weights of L1H2 by 0.5\n  add 3 * d to weights of L1N3\n}\n"
        "model half = m + 0.5 * (c - m)\n"
    )
    said = str(mechdsl.explain(head + models + of_counting("half")))
    first, second, _ = said.split("\n\n", 2)
    assert first.startswith("model c · m with edited weights\n  scale weights of L1H2 by 0.5\n")
    assert "sites: weights of L1H2" in first
    assert "3.0 * d on weights of mlp_out layer 1: " in first
    assert second == "model half · m + 0.5 * (c - m)"


# --- errors ---------------------------------------------------------------------------------------

REFUSED = {
    "scale weights of resid_post layer 1 by 0": "no weights of heads or neurons write to",
    "set weights of L1N3 to 0": "not to a number",
    "set weights of layer 1 head 2 to d": "several vectors",
    "add d to weights of L1.attn": "several vectors",
}


@pytest.mark.parametrize("line", REFUSED)
def test_invalid_weight_rules_are_errors(line: str, data: Path) -> None:
    text = DIRECTION + experiment("e", line)
    result, found = try_file(text, data, "llama")
    assert result is None
    (problem,) = [each for each in found if each.severity == "error"]
    assert problem.code == "E0344"
    assert REFUSED[line] in problem.message
    of_model_ = f"model c = m with {{ {line} }}\n" + of_model("c")
    result, found = run_models(of_model_, data, "llama")
    assert [each.code for each in found if each.severity == "error"] == ["E0344"]


ORDERS = {
    "patch mlp_out layer 1 at last token\n  scale weights of L1N3 by 0": "would change",
    "scale weights of L1N3 by 0\n  set weights of L1N3 to d": "has changed these weights",
    "scale weights of L1.mlp by 0.5\n  add d to weights of L1N3": "has changed these weights",
    "project out d from weights\n  scale weights of L1N3 by 2": "has changed these weights",
    "scale weights of layer 1 head 0 by 2\n  patch head_out layer 1 head 0 at last token": "own",
}


@pytest.mark.parametrize("lines", ORDERS)
def test_weight_rules_in_an_invalid_order_are_errors(lines: str, data: Path) -> None:
    text = DIRECTION + experiment("e", "from other into clean", lines)
    result, found = try_file(text, data, "llama")
    assert result is None
    (problem,) = [each for each in found if each.severity == "error"]
    assert problem.code == "E0344"
    assert ORDERS[lines] in problem.message


def test_weight_rule_on_neurons_of_several_layers_is_an_error(data: Path) -> None:
    text = "group g = L1N5, L2N7\n" + experiment("e", "scale weights of g by 0")
    assert codes(text, data) == ["E0344"]


def test_weight_rule_before_an_output_norm_is_an_error(data: Path) -> None:
    """The rule is an error before anything runs."""
    text = experiment("e", "scale weights of L1N3 by 0")
    result, found = try_file(text, data, "gemma2")
    assert result is None
    (problem,) = [each for each in found if each.severity == "error"]
    assert problem.code == "E0344"
    assert "between these weights and the stream" in problem.message


EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
"""Routed experts; one with a shared expert; one with transposed weights and biases."""


@pytest.mark.parametrize("family", EXPERTS)
def test_direction_out_of_weights_of_experts_equals_edited_weights(family: str, data: Path) -> None:
    """As a rule, as an edited model, and with a rule on the edited model; router unchanged."""
    text = "model c = m with { project out d from weights }\n" + of_model("c")
    text += of_model("m", "project out d from weights", name="rule")
    text += of_model("c", "ablate mlp_out layer 1 at last token with zero", name="ablated")
    found = by_name(*run_models(text, data, family))
    model = ByHand(family)
    vectors = [[stream_after(model, text.ids) for text in rows(run)] for run in ("other", "second")]
    u = unit(torch.stack(vectors[0]).mean(0) - torch.stack(vectors[1]).mean(0))
    base = values(model)
    for name, parameter in model.model.named_parameters():
        own = parameter.detach()
        if name.endswith(("embed_tokens.weight", "proj_bias", "o_proj.bias")) and (
            "gate_up" not in name
        ):
            own -= (own @ u)[..., None] * u
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            own -= u[:, None] * (u @ own)
        elif name.endswith("down_proj"):
            own = own if family == "gpt_oss" else own.mT
            own -= (own @ u)[..., None] * u
    expected = values(model)
    assert np.abs(np.subtract(expected, base)).max() > 1e-3
    assert np.abs(raw(found["e"])[0] - expected).max() < 1e-4
    assert np.abs(raw(found["rule"])[0] - expected).max() < 1e-4

    def without_last(module: Any, args: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        whole = torch.cat([whole[:, :-1], torch.zeros_like(whole[:, -1:])], dim=1)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    model.model.get_submodule("model.layers.1.mlp").register_forward_hook(without_last)
    assert np.abs(raw(found["ablated"])[0] - values(model)).max() < 1e-4


def stream_after(model: ByHand, ids: Sequence[int]) -> Tensor:
    """[d_model]: the stream after layer 1 at the last token."""
    with torch.no_grad():
        output = model.model(torch.tensor([list(ids)]), output_hidden_states=True)
    return output.hidden_states[2][0, -1]


@pytest.mark.parametrize(
    ("family", "reason"), [("gemma2", "between the weights"), ("bloom", "a sum of embeddings")]
)
def test_projection_that_weights_do_not_write_is_an_error(
    family: str, reason: str, data: Path
) -> None:
    text = DIRECTION + experiment("e", "project out d from weights")
    result, found = try_file(text, data, family)
    assert result is None
    (problem,) = [each for each in found if each.severity == "error"]
    assert (problem.code, reason in problem.message) == ("E0344", True), problem.message


def test_multi_token_answers_on_a_run_with_weight_rules_are_an_error(data: Path) -> None:
    text = LONG + experiment(
        "e",
        "run hurt { scale weights of L1N3 by 0 }",
        "from clean into hurt",
        "patch resid_post layer 1 at last token",
        block="long",
        measure="measure logprob(answer) as raw",
    )
    assert codes(text, data) == ["E0344"]


@pytest.mark.parametrize(
    "edits",
    [
        "scale weights of top 1 of r by 0",
        "scale weights of attn_out layer 1 head * except top 1 of r by 0",
        "project out u[best of r] from weights",
    ],
)
def test_model_edits_that_depend_on_results_are_errors(edits: str, data: Path) -> None:
    """Regression: `validate` accepted them, and the run failed with an internal error."""
    text = 'direction u = unembedding(" w3", " w9") at resid_post layer *\n'
    text += f"model cured = m with {{ {edits} }}\n"
    text += experiment("r", "ablate layer 1 head * at last token with zero")
    text += experiment("e").replace("model m", "model cured")
    result, found = try_file(text, data, "llama")
    assert "E0344" in [each.code for each in found if each.severity == "error"]
    assert result is None
