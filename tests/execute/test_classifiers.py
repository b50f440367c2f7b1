"""Files on classifiers: one output for a whole prompt, or labels for each of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import mechdsl
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.passes import PASS_NAMES
from mechdsl.results.experiment_result import ExperimentResult

from ..families.build import VOCABULARY
from ..quick import in_turn
from . import classifiers
from .classifiers import LABELS, OF_PROMPTS, OF_TOKENS, classifier, outputs, patched

A = ["w11", "w12 w13", "w14 w15 w16"]
B = ["w21", "w22 w23 w24 w25"]
"""Prompts of five lengths, so that batches are padded."""
PROMPTS = """\
mech 1
model m = local("none")
prompts p {
  a in ["w11", "w12 w13", "w14 w15 w16"]
  b in ["w21", "w22 w23 w24 w25"]
  mood in ["negative", "positive"]
  template "{a} {b} w9"
  answer mood
  wrong if mood = "negative" then "positive" else "negative"
  corrupt other { a = "w18" }
}
"""
FILE = (
    PROMPTS
    + """\
experiment e {
  prompts p
  from clean into other
  patch SITE at token 0, a token, b token, last token
  measure MEASURE
}
"""
)
BOTH = "logit(class answer) - logit(class wrong) as delta"


def ran(
    family: str, build: str, measure: str, site: str, tmp_path: Path, **options: Any
) -> ExperimentResult:
    _, module = classifier(family, build)
    path = tmp_path / "file.mech"
    text = FILE.replace("SITE", site).replace("MEASURE", measure)
    path.write_text(text, encoding="utf-8")
    models = {"m": (module, classifiers.tokenizer())}
    return mechdsl.run(path, models=models, **options)["e"]


def places(a: str, b: str) -> dict[str, int]:
    count = len(a.split())
    return {
        "0": 0,
        "a token": count,
        "b token": count + len(b.split()),
        "last token": count + len(b.split()) + 1,
    }


def held(
    result: ExperimentResult, family: str, build: str, site: str, at: str | None = None
) -> None:
    """Compare every cell and row with plain hooks. at: the position of token labels."""
    values = result.row_values
    rows = list(zip(values["a"], values["b"], values["mood"], strict=True))
    largest = 0.0
    for cell, found in zip(result.cells, result.measures[0].patched, strict=True):
        layer, position = int(cell.coords["layer"]), str(cell.coords["position"])
        for (a, b, mood), value in zip(rows, found, strict=True):
            texts = f"{a} {b} w9", f"w18 {b} w9"
            own, base = places(a, b), places("w18", b)
            there = own[position], base[position]
            logits = patched(family, build, texts, site, layer, there)
            plain = outputs(family, build, texts[1])
            if at is not None:
                logits, plain = logits[base[at]], plain[base[at]]
            right = LABELS.index(mood)
            wrong = LABELS.index("positive" if mood == "negative" else "negative")
            expected = float(logits[right] - logits[wrong])
            assert value == pytest.approx(expected, abs=1e-4, rel=1e-3)
            largest = max(largest, abs(expected - float(plain[right] - plain[wrong])))
    assert largest > 0.02


@pytest.mark.parametrize(
    ("family", "site"), in_turn(list(OF_PROMPTS), ["resid_post", "attn_out"], list(OF_PROMPTS)[::2])
)
def test_classifier_of_prompts_equals_plain_hooks(family: str, site: str, tmp_path: Path) -> None:
    build = OF_PROMPTS[family]
    result = ran(family, build, BOTH, f"{site} layer *", tmp_path)
    held(result, family, build, site)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_classifier_in_full_forward_passes_equals_plain_hooks(family: str, tmp_path: Path) -> None:
    site = "mlp_out"
    whole = ran(family, OF_PROMPTS[family], BOTH, f"{site} layer *", tmp_path, no_pass=PASS_NAMES)
    held(whole, family, OF_PROMPTS[family], site)


@pytest.mark.parametrize("family", list(OF_TOKENS))
def test_classifier_of_tokens_equals_plain_hooks(family: str, tmp_path: Path) -> None:
    build = OF_TOKENS[family]
    measure = BOTH.replace(" as", " at b token as")
    result = ran(family, build, measure, "resid_post layer *", tmp_path)
    held(result, family, build, "resid_post", "b token")


def test_modernbert_classifier_has_no_final_norm_site() -> None:
    """ModernBERT has a last norm there."""
    module = classifier("modernbert", OF_PROMPTS["modernbert"])[1]
    model, _ = adopt_model("m", module, classifiers.tokenizer())
    assert model is not None
    assert "final_norm" not in model.shape.sites
    assert "only the token for the output is processed" in model.anatomy.without["final_norm"]


def test_classifiers_are_restartable_and_have_labels() -> None:
    """Rows of these models can start at the changed block."""
    for family, build in OF_PROMPTS.items():
        model, found = adopt_model("m", classifier(family, build)[1], classifiers.tokenizer())
        assert found == []
        assert model is not None
        assert model.restartable
        assert model.shape.labels == LABELS


# --- metrics ------------------------------------------------------------------------------------


def values(family: str, build: str, measure: str, tmp_path: Path, **settings: Any) -> list[float]:
    """A measure of the unpatched prompts, by the words of `a`, `b` and `mood`."""
    _, module = classifier(family, build, **settings)
    path = tmp_path / "file.mech"
    site = "resid_post layer 0"
    text = (
        FILE.replace("SITE", site).replace("MEASURE", measure).replace("into other", "into clean")
    )
    text = text.replace("  from clean into clean\n", "").replace(
        f"  patch {site} at token 0, a token, b token, last token\n",
        "  ablate resid_post layer 0 at last token with zero\n",
    )
    path.write_text(text, encoding="utf-8")
    result = mechdsl.run(path, models={"m": (module, classifiers.tokenizer())})["e"]
    own = result.row_values
    texts = zip(own["a"], own["b"], own["mood"], strict=True)
    base = result.measures[0].base[0]
    return [float(value) for _, value in sorted(zip(texts, base, strict=True))]


def by_hand(family: str, build: str, function: Any, **settings: Any) -> list[float]:
    return [
        float(function(outputs(family, build, f"{a} {b} w9", **settings), LABELS.index(mood)))
        for a, b, mood in sorted((a, b, m) for a in A for b in B for m in ("negative", "positive"))
    ]


@pytest.mark.parametrize(
    ("measure", "function"),
    [
        ("logit(class answer)", lambda x, n: x[n]),
        ("prob(class answer)", lambda x, n: x.softmax(-1)[n]),
        ("logprob(class answer)", lambda x, n: x.log_softmax(-1)[n]),
        ("loss(class answer)", lambda x, n: -x.log_softmax(-1)[n]),
        ("rank(class answer)", lambda x, n: 1 + (x > x[n]).sum()),
        ("correct", lambda x, n: x.argmax() == n),
        ("correct(class answer)", lambda x, n: x.argmax() == n),
        ('prob(class "neutral")', lambda x, n: x.softmax(-1)[1]),
        ("logit(class 1)", lambda x, n: x[1]),
        ("entropy", lambda x, n: -(x.softmax(-1) * x.log_softmax(-1)).sum()),
    ],
)
def test_classifier_metrics_equal_the_reference(
    measure: str, function: Any, tmp_path: Path
) -> None:
    build = OF_PROMPTS["bert"]
    found = values("bert", build, f"{measure} as raw", tmp_path)
    assert found == pytest.approx(by_hand("bert", build, function), abs=1e-5)


@pytest.mark.parametrize(
    ("measure", "function"),
    [
        ("prob(class answer)", lambda x, n: x[n].sigmoid()),
        ("logprob(class answer)", lambda x, n: torch.nn.functional.logsigmoid(x[n])),
        ("loss(class answer)", lambda x, n: -torch.nn.functional.logsigmoid(x[n])),
        ("correct", lambda x, n: x[n] > 0),
        ("logit(class answer)", lambda x, n: x[n]),
    ],
)
def test_multi_label_metrics_equal_the_reference(
    measure: str, function: Any, tmp_path: Path
) -> None:
    build, kind = OF_PROMPTS["gpt2"], {"problem_type": "multi_label_classification"}
    found = values("gpt2", build, f"{measure} as raw", tmp_path, **kind)
    assert found == pytest.approx(by_hand("gpt2", build, function, **kind), abs=1e-5)


@pytest.mark.parametrize(
    ("names", "measure", "number"),
    [
        (((0, "score"),), "output", 0),
        (((0, "score"),), "output(class 0)", 0),
        (((0, "valence"), (1, "arousal")), 'output(class "arousal")', 1),
    ],
)
def test_regression_outputs_equal_the_reference(
    names: tuple[tuple[int, str], ...], measure: str, number: int, tmp_path: Path
) -> None:
    build, kind = OF_PROMPTS["gpt2"], {"problem_type": "regression", "names": names}
    found = values("gpt2", build, f"{measure} as raw", tmp_path, **kind)
    expected = by_hand("gpt2", build, lambda x, n: x[number], **kind)
    assert found == pytest.approx(expected, abs=1e-5)


def test_keep_and_accuracy_of_classifiers_use_the_label(tmp_path: Path) -> None:
    build = OF_PROMPTS["bert"]
    correct = by_hand("bert", build, lambda x, n: x.argmax() == n)
    share = sum(correct) / len(correct)
    assert 0 < share < 1
    measure = "prob(class answer) as delta\n  expect accuracy(clean) "
    measure += f"near {share:.4f} within 0.001 on mean"
    result = ran("bert", build, measure, "resid_post layer 0", tmp_path)
    assert [each.holds for each in result.outcomes] == [True]
    result = ran("bert", build, "prob(class answer) as delta\n  keep correct", "embed", tmp_path)
    assert result.prompts == sum(correct)


# --- the token that a classifier reads ------------------------------------------------------------


def test_classifier_ignores_a_pad_token_at_the_end_of_a_prompt(tmp_path: Path) -> None:
    """The library reads the last token that isn't the pad token, also in a single prompt."""
    found = []
    for end in ("w9", "w9 <pad>"):
        text = PROMPTS.replace("w9", end) + (
            "experiment e {\n  prompts p\n  ablate resid_post layer 0 at a token with zero\n"
            "  measure logit(class answer) as raw\n}\n"
        )
        (tmp_path / "file.mech").write_text(text, encoding="utf-8")
        module = classifier("gpt2", OF_PROMPTS["gpt2"])[1]
        result = mechdsl.run(
            tmp_path / "file.mech", models={"m": (module, classifiers.tokenizer())}
        )
        found.append(result["e"].measures[0])
    assert found[0].base == pytest.approx(found[1].base, abs=1e-5)
    assert found[0].patched == pytest.approx(found[1].patched, abs=1e-5)


class _Pooled(LlamaPreTrainedModel):
    """A custom classifier that selects one token's vector before its head."""

    by_id = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels or 0)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **other: Any
    ) -> SequenceClassifierOutput:
        hidden = self.model(input_ids, attention_mask=attention_mask, **other)[0]
        last = torch.full((len(hidden),), hidden.shape[1] - 1)
        if self.by_id:
            columns = torch.arange(input_ids.shape[1])
            found = ((input_ids != self.config.pad_token_id) * columns).argmax(-1)
            last = found if len(found) == len(hidden) else last
        return SequenceClassifierOutput(logits=self.score(hidden[torch.arange(len(hidden)), last]))


class PooledForSequenceClassification(_Pooled):
    """Selects the last token that isn't the pad token."""


class VeryLastForSequenceClassification(_Pooled):
    by_id = False


def pooled(kind: type[_Pooled]) -> _Pooled:
    module: Any = classifier("llama", OF_PROMPTS["llama"])[1]
    own: dict[str, Any] = {"architectures": [kind.__name__], "initializer_range": 0.3}
    config: Any = LlamaConfig(**{**module.config.to_dict(), **own})
    torch.manual_seed(3)
    return kind(config).eval()


def of_pooled(kind: type[_Pooled], end: str, folder: Path, **options: Any) -> ExperimentResult:
    text = PROMPTS.replace("w9", end) + (
        "experiment e {\n  prompts p\n  ablate mlp_out layer * at a token, token -2 with zero\n"
        "  measure logit(class answer) as raw\n}\n"
    )
    (folder / "file.mech").write_text(text, encoding="utf-8")
    models = {"m": (pooled(kind), classifiers.tokenizer())}
    return mechdsl.run(folder / "file.mech", models=models, **options)["e"]


@pytest.mark.slow
def test_packed_rows_of_pooled_classifiers_equal_full_forward_passes(tmp_path: Path) -> None:
    """The head follows the selection of a token, which the model makes, not the planner."""
    kinds = (PooledForSequenceClassification, "w9 <pad>"), (VeryLastForSequenceClassification, "w9")
    for kind, end in kinds:
        packed = of_pooled(kind, end, tmp_path).measures[0].patched
        whole = of_pooled(kind, end, tmp_path, no_pass=PASS_NAMES).measures[0].patched
        assert packed == pytest.approx(whole, abs=1e-5)
        assert abs(whole - whole[0]).max() > 0.02


def test_pad_token_for_a_classifier_that_reads_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(mechdsl.MechdslError, match="E0439"):
        of_pooled(VeryLastForSequenceClassification, "w9 <pad>", tmp_path)


def test_adopted_classifier_reports_the_last_token_that_it_reads() -> None:
    for kind, skips in (
        (PooledForSequenceClassification, 0),
        (VeryLastForSequenceClassification, None),
    ):
        model, found = adopt_model("m", pooled(kind), classifiers.tokenizer())
        assert model is not None, found
        assert model.calling.reads == "last token"
        assert model.calling.skips == skips
        assert model.restartable


def test_classifier_without_a_pad_token_runs_in_padded_batches(tmp_path: Path) -> None:
    """The library rejects such batches."""
    build = OF_PROMPTS["gpt2"]
    found = values("gpt2", build, "logit(class answer) as raw", tmp_path, pad_token_id=None)
    assert found == pytest.approx(by_hand("gpt2", build, lambda x, n: x[n]), abs=1e-5)


def test_last_block_patch_of_a_classifier_acts_only_at_the_read_token(tmp_path: Path) -> None:
    module = classifier("bert", OF_PROMPTS["bert"])[1]
    last: Any = module.config
    site = f"resid_post layer {last.num_hidden_layers - 1}"
    result = ran("bert", OF_PROMPTS["bert"], BOTH, site, tmp_path)
    effects = {
        str(cell.coords["position"]): row
        for cell, row in zip(
            result.cells, result.measures[0].patched - result.measures[0].base, strict=True
        )
    }
    assert abs(effects["0"]).max() > 0.02
    assert all(abs(effects[at]).max() < 1e-9 for at in ("a token", "b token", "last token"))


# --- more outputs than tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("named", ["class 63", 'class "six"'])
def test_output_without_a_token_is_named_by_class_number_or_label(
    named: str, tmp_path: Path
) -> None:
    """A language model with three outputs more than tokens."""
    count = VOCABULARY + 3
    module: Any = classifier("gpt2", "GPT2LMHeadModel", tie_word_embeddings=False)[1]
    module.lm_head = torch.nn.Linear(module.config.n_embd, count, bias=False)
    module.config.id2label = {n: str(n) for n in range(count - 1)} | {count - 1: "six"}
    path = tmp_path / "file.mech"
    path.write_text(
        'mech 1\nmodel m = local("none")\n'
        'prompts p {\n  a in ["w11", "w12 w13"]\n  template "{a} w9"\n}\n'
        "experiment e {\n  prompts p\n  ablate resid_post layer 0 at a token with zero\n"
        f'  measure logit({named}) - logit(" w3") as raw\n}}\n',
        encoding="utf-8",
    )
    result = mechdsl.run(path, models={"m": (module, classifiers.tokenizer())})["e"]
    for a, value in zip(result.row_values["a"], result.measures[0].base[0], strict=True):
        with torch.no_grad():
            logits = module(**classifiers.prompt(f"{a} w9")).logits[0, -1]
        expected = float(logits[count - 1] - logits[classifiers.IDS["w3"]])
        assert value == pytest.approx(expected, abs=1e-4)


# --- from another model ---------------------------------------------------------------------------

TWO = (
    PROMPTS.replace("  wrong", "  text other_mood =").replace(
        "model m", 'model tuned = local("none")\nmodel m'
    )
    + """\
experiment e {
  prompts p
  model m
  from clean into other
  patch resid_post layer * at a token with tuned
  measure logit(class answer) as delta
}
"""
)


def other_names() -> torch.nn.Module:
    """The same classifier with other label names."""
    names = tuple(enumerate(("bad", "so", "good")))
    return classifier("gpt2", OF_PROMPTS["gpt2"], names=names)[1]


def language_model() -> torch.nn.Module:
    """The language model from which the classifier was derived."""
    module: Any = classifier("gpt2", "GPT2LMHeadModel")[1]
    tuned: Any = classifier("gpt2", OF_PROMPTS["gpt2"])[1]
    module.transformer.load_state_dict(tuned.transformer.state_dict())
    return module


def headless() -> torch.nn.Module:
    module: Any = classifier("gpt2", "GPT2Model")[1]
    tuned: Any = classifier("gpt2", OF_PROMPTS["gpt2"])[1]
    module.load_state_dict(tuned.transformer.state_dict())
    return module


@pytest.mark.parametrize("other", [other_names, language_model, headless])
def test_patch_from_a_model_with_other_outputs_equals_the_classifier(
    other: Any, tmp_path: Path
) -> None:
    """The residual streams are equal, and so are the patched vectors."""
    found: list[Any] = []
    module = classifier("gpt2", OF_PROMPTS["gpt2"])[1]
    for tuned in (module, other()):
        (tmp_path / "file.mech").write_text(TWO, encoding="utf-8")
        models = {
            name: (each, classifiers.tokenizer())
            for name, each in (("m", module), ("tuned", tuned))
        }
        found.append(mechdsl.run(tmp_path / "file.mech", models=models)["e"].measures[0].patched)
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert abs(found[0] - found[0][-1]).max() > 0.02


@pytest.mark.parametrize("other", [other_names, language_model, headless])
def test_measure_on_two_models_with_different_outputs_is_an_error(
    other: Any, tmp_path: Path
) -> None:
    text = TWO.replace("model m\n  from clean into other", "from tuned into m").replace(
        " with tuned", ""
    )
    (tmp_path / "file.mech").write_text(text, encoding="utf-8")
    own = classifier("gpt2", OF_PROMPTS["gpt2"])[1]
    models = {"m": (own, classifiers.tokenizer()), "tuned": (other(), classifiers.tokenizer())}
    with pytest.raises(mechdsl.MechdslError, match=r"(?s)E0415.*after `patch`"):
        mechdsl.run(tmp_path / "file.mech", models=models)
