"""Custom models with hand-set or trained weights: idle components, few positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mechdsl import run, validate
from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import BlockStack, LoadedModel
from mechdsl.forward.packed.activation_cache import record_activations
from mechdsl.forward.packed.packed_pass import run_packed
from mechdsl.loading.anatomy_proof import _try_anatomies, build_loaded_model, verify_model  # pyright: ignore[reportPrivateUsage]
from mechdsl.loading.loader import adopt_model, load_model
from mechdsl.models.shape import Anatomy
from mechdsl.results.experiment_result import ExperimentResult

from ..reference.forward import Write, forward
from . import broken, families, own_models
from .conftest import statement
from .test_against_reference import in_all, with_blocks
from .test_verify import FAULTS, swap

EMPTY = ("mlp_norm", "mlp_hidden")
"""Sites without effect in a zeroed MLP; writes to `mlp_out` still have one."""


def taken(module: nn.Module, tokenizer: Any = None, *codes: str) -> LoadedModel:
    model, found = adopt_model("m", module, tokenizer or families.tokenizer())
    assert model is not None, [(d.code, d.message, d.label_text) for d in found]
    assert [d.code for d in found] == list(codes)
    return model


@cache
def without_mlps(family: str) -> LoadedModel:
    return taken(own_models.silenced(family, "mlp"), None, "W0770")


def idle(*sites: str, layers: Sequence[int]) -> set[tuple[str, str, int | None]]:
    return {("", site, layer) for site in sites for layer in layers}


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "gpt_neox"))]
)
def test_zeroed_mlps_warn_and_keep_the_model_restartable(family: str) -> None:
    model = without_mlps(family)
    assert set(model.idle) == idle(*EMPTY, layers=range(3))
    assert model.restartable
    assert all(outcome.passed for outcome in model.checks)
    assert "a value 100 times as large changes the logits (of a copy with random weights)" in {
        outcome.identity for outcome in model.checks
    }


def test_idle_component_warning_names_site_and_layer() -> None:
    _, found = adopt_model(
        "m", own_models.silenced("gpt2", "mlp", layers=(1,)), families.tokenizer()
    )
    assert found[0].label_text == (
        "writing to these components doesn't change the output: `mlp_norm` (layer 1), "
        "`mlp_hidden` (layer 1)"
    )


def test_zeroed_attention_and_mlps_have_idle_sites_in_all_layers() -> None:
    model = taken(own_models.silenced("gpt2", "attn", "mlp"), None, "W0770")
    parts = (*EMPTY, "attn_norm", "q", "k", "v", "z")
    assert set(model.idle) == idle(*parts, layers=range(3))


def test_neurons_inactive_on_check_prompts_are_not_idle() -> None:
    """Neurons that are 0 on all prompts of the check stay 0 when multiplied by 100."""
    module: Any = families.module("gpt2", activation_function="relu")
    with torch.no_grad():
        module.transformer.h[1].mlp.c_fc.bias.fill_(-1000.0)
    model = taken(module, None, "W0770")
    # No norm activates them, but writes to the neurons themselves have an effect.
    assert set(model.idle) == idle("mlp_norm", layers=(1,))


@pytest.mark.parametrize("site", ["mlp_hidden", "mlp_out", "mlp_norm", "z", "resid_mid"])
def test_reads_and_writes_of_idle_sites_equal_hooks(site: str) -> None:
    model = without_mlps("gpt2")
    ids = [1, 9, 22, 31, 17]
    bare = own_models.silenced("gpt2", "mlp")
    seen = forward("gpt2", bare, ids)[site, 1]
    batch = Batch.of([ids], model.pad_id, "left", model.device)
    read = run_full(model, batch, reads=[SiteRead(site, 1)]).reads[SiteRead(site, 1)]
    torch.testing.assert_close(read[0], seen, atol=1e-5, rtol=1e-4)
    values = torch.randn(seen.shape[-1], generator=torch.Generator().manual_seed(3))
    expected = forward("gpt2", bare, ids, [Write(site, 1, values, 2, 0)]).logits
    write = SiteWrite(
        site, 1, torch.tensor([0]), torch.tensor([2]), torch.tensor([0]), values[None]
    )
    whole = run_full(model, batch, writes=[write]).logits
    assert whole is not None
    torch.testing.assert_close(whole[0], expected, atol=1e-4, rtol=1e-3)
    with record_activations(model, batch, 0) as kept:
        run_full(model, batch)
    last = (np.array([0]), np.array([len(ids) - 1]))
    packed = run_packed(model, kept, np.array([0]), writes=[write], final=last)
    torch.testing.assert_close(packed.logits[0], expected[-1], atol=1e-4, rtol=1e-3)


# --- wrong anatomies of models with idle components ---------------------------------------------

WRONG: list[tuple[str, Callable[[Anatomy], Anatomy]]] = [
    (fault, change) for family, fault, change, _ in FAULTS if family == "gpt2"
]


@pytest.mark.parametrize(("fault", "change"), WRONG, ids=[fault for fault, _ in WRONG])
def test_wrong_anatomy_of_zeroed_attention_is_rejected(
    fault: str, change: Callable[[Anatomy], Anatomy]
) -> None:
    """Attention is all zero, so only a copy with random weights reveals the fault."""
    good = silent_attention()
    tried = verify_model(
        build_loaded_model("m", good.module, {"": BlockStack(change(good.anatomy), good.shape)})
    )
    assert tried.model is None, fault
    assert [d.code for d in tried.problems] == ["E0410"]


@cache
def silent_attention() -> LoadedModel:
    return taken(own_models.silenced("gpt2", "attn"), None, "W0770")


def test_swapped_sites_of_zeroed_mlps_are_rejected() -> None:
    good = without_mlps("gpt2")
    swapped = swap("mlp_norm", "mlp_out")(good.anatomy)
    tried = verify_model(
        build_loaded_model("m", good.module, {"": BlockStack(swapped, good.shape)})
    )
    assert tried.model is None


def test_mlp_output_discarded_by_a_hook_is_rejected() -> None:
    """The neurons are computed and discarded, with any weights."""
    module: Any = families.module("gpt2")
    for block in module.transformer.h:
        block.mlp.c_proj.register_forward_hook(lambda part, args, out: out * 0)
    model, found = adopt_model("m", module, families.tokenizer())
    assert model is None
    assert [d.code for d in found] == ["E0410"]


def test_restart_check_detects_a_leak_through_an_idle_component() -> None:
    """A block that adds another block's output passes the check while that output is zero."""
    module: Any = own_models.silenced("gpt2", "mlp")
    kept: list[Tensor] = []
    first, last = module.transformer.h[0].mlp, module.transformer.h[2].attn.c_attn
    first.register_forward_hook(lambda part, args, out: kept.append(out.mean(-1, keepdim=True)))
    last.register_forward_hook(lambda part, args, out: out + kept[-1])
    model, found = adopt_model("m", module, families.tokenizer())
    assert model is not None
    assert {d.code for d in found} == {"W0711", "W0770"}


# --- hand-set circuits --------------------------------------------------------------------------


@pytest.mark.parametrize("low", [0.0, -1e4], ids=["plain", "a logit of -10^4"])
def test_hand_set_circuit_is_adopted_and_patched(low: float) -> None:
    module = own_models.copier(low)
    model = taken(module, own_models.words(), "W0770")
    empty = ("attn_norm", "q", "k", "v", "z")
    assert set(model.idle) == idle(*empty, layers=(0,)) | idle(*EMPTY, layers=(0, 1))
    ids, other = [3, 4, 5, 2], [3, 4, 0, 2]
    source = forward("gpt2", module, other)
    batch = Batch.of([ids], model.pad_id, "left", model.device)
    # Token 5 is at position 2 and is copied at position 3.
    for place, copied in ((2, 0), (3, 5)):
        value = source["resid_pre", 1][place]
        write = SiteWrite(
            "resid_pre", 1, torch.tensor([0]), torch.tensor([place]), torch.tensor([0]), value
        )
        logits = run_full(model, batch, writes=[write]).logits
        assert logits is not None
        expected = torch.zeros(own_models.TOKENS)
        expected[1], expected[copied] = low, 1.0
        torch.testing.assert_close(logits[0, 3], expected, atol=1e-6, rtol=1e-6)


REVERSED = """
mech 1
model m = local("m")
prompts lists {
  a in ["w0", "w2", "w4"]
  b in ["w1", "w3"]
  c in ["w5", "w1"]
  template "{a} {b} {c} w7 w7 w7"
  answer " {a}"
  corrupt other { a = if a = "w0" then "w2" else "w0" }
}
experiment e {
  prompts lists
  from clean into other
  patch resid_pre layer * at token *
  measure logit(answer) - logit(answer of other) as recovery
  expect accuracy(clean) > 0.25
}
"""
COUNTED = """
mech 1
model m = local("m")
prompts lists {
  n in 2..4
  one in ["w1"]
  zero in ["w0"]
  ones = list(one, n, sep: " ")
  zeros = list(zero, 5 - n, sep: " ")
  template "{ones} {zeros} w7"
  answer " w{n}"
  corrupt fewer { n = n - 1 }
}
experiment e {
  prompts lists
  from clean into fewer
  patch resid_pre layer * at token *
  measure logit(answer) - logit(answer of fewer) as recovery
  expect accuracy(clean) > 0.25
}
"""


def recovered(text: str, module: nn.Module) -> tuple[dict[tuple[int, int], Any], ExperimentResult]:
    """(layer, token) → recovery in each prompt."""
    tokenizer = own_models.words(count=own_models.TOKENS)
    result = run(text, models={"m": (module, tokenizer)})["e"]
    assert result.holds
    assert result.accuracy_of("clean").mean == 1
    measure = result.measures[0]
    assert measure.source is not None
    each = (measure.patched - measure.base) / (measure.source - measure.base)
    places = [(cell.coords["layer"], int(cell.coords["position"])) for cell in result.cells]
    return dict(zip(places, each, strict=True)), result


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_hand_set_reverser_gives_an_exact_table() -> None:
    """Block 1 reads the last predicted token from the first position."""
    found, _ = recovered(REVERSED, own_models.reverser())
    for (layer, place), each in found.items():
        np.testing.assert_allclose(each, float(place == 0), atol=1e-6, err_msg=f"{layer} {place}")


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_hand_set_counter_gives_an_exact_table() -> None:
    """Both runs differ only at position n - 1, where one has a counted token more."""
    found, result = recovered(COUNTED, own_models.counter())
    counts = [int(n) for n in result.row_values["n"]]
    assert sorted(counts) == [2, 3, 4]
    for (layer, place), each in found.items():
        expected = [float(place == n - 1) for n in counts]
        np.testing.assert_allclose(each, expected, atol=1e-6, err_msg=f"{layer} {place}")


# --- positions and the beginning of texts -------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_logits_of_models_with_few_positions_equal_the_reference(count: int) -> None:
    model = taken(families.module("gpt2", n_positions=count))
    ids = [1, 9, 22, 31, 17, 40][:count]
    batch = Batch.of([ids], model.pad_id, "left", model.device)
    logits = run_full(model, batch).logits
    assert logits is not None
    expected = forward("gpt2", families.module("gpt2", n_positions=count), ids).logits
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-3)


def test_position_table_overrides_the_position_count_of_the_config() -> None:
    module: Any = families.module("gpt2")
    module.transformer.wpe = nn.Embedding(3, 24)
    assert module.config.n_positions == 64
    taken(module)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("RobertaForMaskedLM", {"max_position_embeddings": 6, "intermediate_size": 28}),
        (
            "OPTForCausalLM",
            {"max_position_embeddings": 5, "ffn_dim": 28, "word_embed_proj_dim": 24},
        ),
    ],
)
def test_padding_rows_of_a_position_table_are_not_positions(
    name: str, settings: dict[str, Any]
) -> None:
    taken(own_models.made(name, **settings))


def needs_bos(module: nn.Module) -> nn.Module:
    """Make a model raise on prompts that don't begin with token 1."""

    def look(part: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        first = torch.zeros_like(ids[:, 0]) if mask is None else mask.int().argmax(-1)
        if mask is None or mask.dim() == 2:
            assert (ids.gather(1, first[:, None]) == 1).all(), "a prompt begins with <s>"

    module.register_forward_pre_hook(look, with_kwargs=True)
    return module


def test_model_that_requires_bos_is_checked_with_bos() -> None:
    # Packed rows begin in the middle of texts, so this model can't run them.
    taken(needs_bos(families.module("gpt2")), None, "W0711")
    model, found = adopt_model("m", needs_bos(families.module("gpt2")), own_models.words())
    assert model is None
    assert "a prompt begins with <s>" in found[0].label_text


def test_idle_components_come_from_the_cached_checks(
    folders: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MECHDSL_CACHE", str(tmp_path / "cache"))
    own_models.silenced("gpt2", "mlp").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    tokens = (folders["gpt2"] / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "model" / "tokenizer.json").write_text(tokens, encoding="utf-8")
    first, said = load_model(statement(str(tmp_path / "model")))
    second, again = load_model(statement(str(tmp_path / "model")))
    assert first is not None
    assert second is not None
    assert second.idle == first.idle
    assert [d.message for d in again] == [d.message for d in said]
    assert second.checks == first.checks


# --- other heads, and none ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BertForTokenClassification", "GPT2ForTokenClassification"])
def test_logits_of_token_classifiers_equal_the_bare_model(name: str) -> None:
    module: Any = own_models.made(name, num_labels=3)
    model = taken(module)
    assert model.shape.outputs == 3
    ids = [1, 9, 22, 31, 17]
    batch = Batch.of([ids, ids[:3]], model.pad_id, "left", model.device)
    at = torch.tensor([[4, 1], [2, 0]])
    logits = run_full(model, batch, logits_at=at).logits
    assert logits is not None
    with torch.no_grad():
        alone = [module(input_ids=torch.tensor([row])).logits[0] for row in (ids, ids[:3])]
    for row, places in enumerate(at.tolist()):
        torch.testing.assert_close(logits[row], alone[row][places], atol=1e-5, rtol=1e-4)


def test_model_may_have_more_logits_than_tokens() -> None:
    module: Any = families.module("gpt2", tie_word_embeddings=False)
    module.lm_head = nn.Linear(24, 60, bias=False)
    model = taken(module)
    assert model.shape.vocab_size == families.VOCABULARY
    assert model.shape.outputs == 60


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model"])
def test_model_without_a_head_has_no_logits(name: str) -> None:
    model = taken(own_models.made(name))
    assert "logits" not in model.shape.sites
    assert "resid_post" in model.shape.sites


# --- wrappers, hooks and memory -----------------------------------------------------------------


@pytest.mark.slow
def test_compiled_model_is_unwrapped() -> None:
    module = families.module("gpt2")
    compiled: Any = torch.compile(module)
    assert taken(compiled).module is module


def test_failed_check_names_a_user_hook() -> None:
    module: Any = families.module("gpt2")
    module.transformer.h[1].mlp.c_proj.register_forward_hook(lambda part, args, out: out * 0)
    model, found = adopt_model("m", module, families.tokenizer())
    assert model is None
    assert "a hook of yours on `transformer.h.1." in found[0].help_text


@pytest.mark.slow
def test_out_of_memory_in_the_checks_is_not_a_wrong_anatomy() -> None:
    module: Any = families.module("gpt2")
    calls = iter(range(1000))

    def fail_later(*_: Any) -> None:
        if next(calls) > 3:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    module.transformer.h[1].mlp.c_proj.register_forward_hook(fail_later)
    model, found = adopt_model("m", module, families.tokenizer())
    assert model is None
    assert found[0].code == "E0411"
    assert "no memory for the passes that check it" in found[0].message + str(found[0])
    assert "bfloat16" in found[0].help_text
    model, found = broken.gaining()
    assert "hook" not in found[0].help_text


def test_site_at_a_missing_module_names_its_path() -> None:
    """A family entry names a module that doesn't exist."""
    good = taken(families.module("gpt2"))
    tap = in_all(good.anatomy, "mlp_out")
    anatomy = with_blocks(good.anatomy, mlp_out=replace(tap, path="transformer.h.{layer}.nothing"))
    tried = _try_anatomies(
        "m",
        good.module,
        {"": BlockStack(anatomy, good.shape)},
        None,
        provenance={},
        span=None,
        known=None,
    )
    assert [d.code for d in tried.problems] == ["E0409"]
    assert "`transformer.h.0.nothing`, which isn't a module" in tried.problems[0].label_text


def test_observing_the_first_token_gives_no_write_warning(tmp_path: Path) -> None:
    file = tmp_path / "e.mech"
    file.write_text(
        """mech 1
model toy = zoo("counting")
prompts fruit {
  count in 3..9
  template "apple pear {count}"
  answer " {count}"
}
experiment e {
  prompts fruit
  observe attention layer 0 head 0 from token 0 to token 0
}
""",
        encoding="utf-8",
    )
    assert "W0731" not in [d.code for d in validate(file)]


class Nothing(nn.Module):
    """An MLP that returns zeros and has no weights."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_block_with_attention_alone_needs_no_family_entry() -> None:
    module: Any = families.module("gpt2")
    for block in module.transformer.h:
        block.mlp = Nothing()
    model = taken(module)
    assert not {"mlp_norm", "mlp_hidden", "mlp_out", "resid_mid"} & model.shape.sites
    assert {"z", "pattern", "attn_out", "resid_post"} <= model.shape.sites
    assert model.restartable


def test_unknown_linear_map_next_to_attention_is_rejected() -> None:
    module: Any = families.module("gpt2")
    for block in module.transformer.h:
        block.mlp, block.thinking = Nothing(), nn.Linear(24, 24)
    model, found = adopt_model("m", module, families.tokenizer())
    assert model is None
    assert [(d.code, d.message) for d in found] == [
        ("E0409", "`m` (GPT2LMHeadModel): MLP not found")
    ]
