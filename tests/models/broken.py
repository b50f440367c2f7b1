"""Faulty models, one for each diagnostic code that needs a model to appear."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import chdir
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from mechdsl.base.text import Source, Span
from mechdsl.checks.file_check import CheckSettings
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.anatomy_proof import prove_any_anatomy
from mechdsl.loading.loader import adopt_model, load_adapter
from mechdsl.models.config import shape_from_config
from mechdsl.pipeline.computation import check_with_models
from mechdsl.program import spec
from tests.families import build, rows_seq2seq
from tests.families.parts import Architecture

from . import families, lora, own_models

Adopted = tuple[LoadedModel | None, list[Diagnostic]]


class Gaining(nn.Module):
    """A block that multiplies what attention adds, as some families do."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args: object, **kwargs: object) -> object:
        out, *rest = self.attention(*args, **kwargs)
        return (out * 2, *rest)


def _adopted(module: nn.Module, tokenizer: Any = None) -> Adopted:
    return adopt_model("toy", module, tokenizer or families.tokenizer())


def nameless() -> Adopted:
    """Return a model whose output projections have an unknown name."""
    module = families.module("llama")
    for layer in module.model.layers:  # type: ignore[union-attr]
        attention: Any = layer.self_attn
        attention.gizmo = attention.o_proj
        del attention.o_proj
    return _adopted(module)


def gaining() -> Adopted:
    module = families.module("llama")
    for layer in module.model.layers:  # type: ignore[union-attr]
        layer.self_attn = Gaining(layer.self_attn)
    return _adopted(module)


def failing() -> Adopted:
    """Return a model that raises when it is called."""
    module = families.module("llama")
    module.get_submodule("model").register_forward_hook(lambda *args: 1 / 0)
    return _adopted(module)


def slow() -> Adopted:
    """Return a model whose tokenizer has no offsets."""
    return _adopted(families.module("gpt2"), object())


def sharing() -> Adopted:
    """Queries of the last layer also get what the first block returned, which rows may not pass."""
    module = families.module("llama")
    layers = module.get_submodule("model.layers")
    kept: list[torch.Tensor] = []
    first, last = layers.get_submodule("0"), layers.get_submodule("2.self_attn.q_proj")

    def keep(block: nn.Module, args: object, output: torch.Tensor) -> None:
        kept[:] = [output.mean(-1, keepdim=True)]

    first.register_forward_hook(keep)
    last.register_forward_hook(lambda m, args, out: out + kept[0])
    return _adopted(module)


def by_itself() -> Adopted:
    """Return a model whose attention bypasses transformers' attention registry."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    module = families.module("llama")

    def attention(
        part: Any, hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: object
    ) -> tuple[torch.Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, part.head_dim)
        q, k, v = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (part.q_proj, part.k_proj, part.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        k, v = (repeat_kv(x, part.num_key_value_groups) for x in (k, v))
        count = q.shape[2]
        mask = torch.ones(count, count, dtype=torch.bool).tril()
        given = kwargs["attention_mask"]
        mask = mask if given is None else mask & given
        scores = (q @ k.transpose(2, 3) * part.scaling).masked_fill(~mask, -1e9)
        z = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return part.o_proj(z), None

    for layer in module.model.layers:  # type: ignore[union-attr]
        layer.self_attn.forward = partial(attention, layer.self_attn)
    return _adopted(module)


def asking() -> Adopted:
    """Return a model whose attention function gets an unknown argument."""
    module = families.module("llama")

    def ask(part: nn.Module, args: Any, kwargs: dict[str, Any]) -> object:
        return args, {**kwargs, "gizmo": 1}

    for layer in module.model.layers:  # type: ignore[union-attr]
        layer.self_attn.register_forward_pre_hook(ask, with_kwargs=True)
    return _adopted(module)


def proved(name: str, module: Any) -> Adopted:
    """Check a model's anatomy without a tokenizer, as `inspect` does."""
    values = {**module.config.to_dict(), "architectures": [type(module).__name__]}
    shape, found = shape_from_config(values, model=name, span=None)
    assert shape is not None, found
    return prove_any_anatomy(name, module, shape, None, provenance={}, span=None)


def windowed() -> Adopted:
    """Return a model whose encoder pads its input beyond the tokens of the text."""
    row = next(row for row in rows_seq2seq.TABLE if row.name == "led")
    assert isinstance(row, Architecture)
    return proved("toy", build.model(row))


def empty() -> Adopted:
    """Return a model whose MLPs are all zero."""
    return _adopted(own_models.silenced("gpt2", "mlp"))


def wordless() -> Adopted:
    """Return a model whose tokenizer has no unknown token."""
    text = _measuring("prob(answer)", "w1", "apple")
    return _checked(text, families.module("gpt2"), own_models.words())


def _checked(text: str, module: nn.Module, tokenizer: Any = None) -> Adopted:
    models = {"toy": (module, tokenizer or families.tokenizer())}
    checked, _ = check_with_models(Source(text, Path("page.mech")), CheckSettings(), models)
    return None, checked.diagnostics


def _measuring(measure: str, first: str, second: str) -> str:
    """Return the text of a file whose prompts vary in one of two words."""
    return f"""mech 1

model toy = local("toy")

prompts words {{
  word in ["{first}", "{second}"]
  template "{{word}} w5"
  answer " w7"
}}

experiment e {{
  prompts words
  measure {measure} as raw
}}
"""


_READS_A_LOGIT = _measuring("logit(answer) at last token", "w1", "w2")


def headless() -> Adopted:
    return _checked(_READS_A_LOGIT, own_models.made("BertModel"))


def narrow() -> Adopted:
    """Return a model with five outputs and a larger vocabulary."""
    module: Any = families.module("gpt2", tie_word_embeddings=False)
    module.lm_head = nn.Linear(24, 5, bias=False)
    return _checked(_READS_A_LOGIT, module)


def comparing() -> Adopted:
    return _adopted(own_models.made("BertForNextSentencePrediction"))


def whole_numbers() -> Adopted:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize: Any = vars(torch.ao.quantization)["quantize_dynamic"]
        return _adopted(quantize(families.module("llama"), {nn.Linear}))


def _with_adapter(**deeper: int) -> Adopted:
    """Load an adapter trained on a LLaMA of 3 (or the given number of) layers on one of 3."""
    text = 'model tuned = local("tuned", base: m)'
    base, found = _adopted(families.module("llama"))
    assert base is not None, found
    with TemporaryDirectory() as folder, chdir(folder):
        lora.save(lora.wrapped(families.module("llama", **deeper), "llama"), Path("tuned"))
        span = Span(Source(text, Path("experiment.mech")), 0, len(text))
        line = spec.Model(span=span, name="tuned", kind="local", path="tuned", base="m")
        return load_adapter(line, base)


def deeper() -> Adopted:
    return _with_adapter(num_hidden_layers=4)


def without_peft() -> Adopted:
    with patch("mechdsl.loading.loader.find_spec", return_value=None):
        return _with_adapter()


CAUSES: dict[str, Callable[[], Adopted]] = {
    "E0409": nameless,
    "E0410": gaining,
    "E0411": failing,
    "E0412": slow,
    "E0436": wordless,
    "E0437": headless,
    "E0438": narrow,
    "E0439": comparing,
    "E0441": whole_numbers,
    "E0453": deeper,
    "E0454": without_peft,
    "W0711": by_itself,
    "W0712": windowed,
    "W0770": empty,
}
"""Functions by code; `docs/errors` shows the message of each."""
