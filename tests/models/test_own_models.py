"""Models that people set by hand or train at home: parts without effect, few positions."""

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
from mechdsl.models.anatomy import Anatomy
from mechdsl.results.experiment_result import ExperimentResult

from ..reference.forward import Write, forward
from . import broken, families, own_models
from .conftest import statement
from .test_against_reference import in_all, with_blocks
from .test_verify import FAULTS, swap

EMPTY = ("mlp_norm", "mlp_hidden")
"""What a zeroed MLP leaves without effect; what it adds may still be written."""


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
def test_mlps_of_zeros_are_named_and_cost_nothing_else(family: str) -> None:
    model = without_mlps(family)
    assert set(model.idle) == idle(*EMPTY, layers=range(3))
    assert model.restartable
    assert all(outcome.passed for outcome in model.checks)
    assert "a value 100 times as large changes the logits (of a copy with random weights)" in {
        outcome.identity for outcome in model.checks
    }


def test_it_is_said_where() -> None:
    _, found = adopt_model(
        "m", own_models.silenced("gpt2", "mlp", layers=(1,)), families.tokenizer()
    )
    assert found[0].label_text == (
        "writing to these components doesn't change the output: `mlp_norm` (layer 1), "
        "`mlp_hidden` (layer 1)"
    )


def test_a_model_of_which_nothing_but_embeddings_is_left() -> None:
    model = taken(own_models.silenced("gpt2", "attn", "mlp"), None, "W0770")
    parts = (*EMPTY, "attn_norm", "q", "k", "v", "z")
    assert set(model.idle) == idle(*parts, layers=range(3))


def test_what_is_asleep_on_the_probe_is_not_without_effect() -> None:
    """Neurons that no prompt of the check wakes up are zero there, times a hundred too."""
    module: Any = families.module("gpt2", activation_function="relu")
    with torch.no_grad():
        module.transformer.h[1].mlp.c_fc.bias.fill_(-1000.0)
    model = taken(module, None, "W0770")
    # No norm gets as far as to wake them; neurons themselves may be written.
    assert set(model.idle) == idle("mlp_norm", layers=(1,))


@pytest.mark.parametrize("site", ["mlp_hidden", "mlp_out", "mlp_norm", "z", "resid_mid"])
def test_empty_parts_are_read_and_written_as_by_hand(site: str) -> None:
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


# --- a wrong anatomy is refused all the same ----------------------------------------------------

WRONG: list[tuple[str, Callable[[Anatomy], Anatomy]]] = [
    (fault, change) for family, fault, change, _ in FAULTS if family == "gpt2"
]


@pytest.mark.parametrize(("fault", "change"), WRONG, ids=[fault for fault, _ in WRONG])
def test_a_wrong_anatomy_is_refused_where_nothing_has_an_effect(
    fault: str, change: Callable[[Anatomy], Anatomy]
) -> None:
    """All of attention is zero, so that zeros pass for zeros; on a copy they don't."""
    good = silent_attention()
    tried = verify_model(
        build_loaded_model("m", good.module, {"": BlockStack(change(good.anatomy), good.shape)})
    )
    assert tried.model is None, fault
    assert [d.code for d in tried.problems] == ["E0410"]


@cache
def silent_attention() -> LoadedModel:
    return taken(own_models.silenced("gpt2", "attn"), None, "W0770")


def test_sublayers_that_add_nothing_may_not_be_swapped() -> None:
    good = without_mlps("gpt2")
    swapped = swap("mlp_norm", "mlp_out")(good.anatomy)
    tried = verify_model(
        build_loaded_model("m", good.module, {"": BlockStack(swapped, good.shape)})
    )
    assert tried.model is None


def test_a_model_that_skips_a_part_whatever_its_weights_are_is_refused() -> None:
    """Its neurons are computed and thrown away: that isn't a matter of weights."""
    module: Any = families.module("gpt2")
    for block in module.transformer.h:
        block.mlp.c_proj.register_forward_hook(lambda part, args, out: out * 0)
    model, found = adopt_model("m", module, families.tokenizer())
    assert model is None
    assert [d.code for d in found] == ["E0410"]


def test_restarting_is_proved_on_parts_that_do_something() -> None:
    """A block that lets its neighbour's stream in passes while that is zero."""
    module: Any = own_models.silenced("gpt2", "mlp")
    kept: list[Tensor] = []
    first, last = module.transformer.h[0].mlp, module.transformer.h[2].attn.c_attn
    first.register_forward_hook(lambda part, args, out: kept.append(out.mean(-1, keepdim=True)))
    last.register_forward_hook(lambda part, args, out: out + kept[-1])
    model, found = adopt_model("m", module, families.tokenizer())
    assert model is not None
    assert {d.code for d in found} == {"W0711", "W0770"}


# --- circuits set by hand -----------------------------------------------------------------------


@pytest.mark.parametrize("low", [0.0, -1e4], ids=["plain", "a logit of -10^4"])
def test_a_circuit_set_by_hand_is_taken_and_patched(low: float) -> None:
    module = own_models.copier(low)
    model = taken(module, own_models.words(), "W0770")
    empty = ("attn_norm", "q", "k", "v", "z")
    assert set(model.idle) == idle(*empty, layers=(0,)) | idle(*EMPTY, layers=(0, 1))
    ids, other = [3, 4, 5, 2], [3, 4, 0, 2]
    source = forward("gpt2", module, other)
    batch = Batch.of([ids], model.pad_id, "left", model.device)
    # Token 5 stands at place 2, and is read at place 3: only there does it matter.
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
def test_a_reverser_set_by_hand_gives_an_exact_table() -> None:
    """What is said last is read from the first place, by block 1."""
    found, _ = recovered(REVERSED, own_models.reverser())
    for (layer, place), each in found.items():
        np.testing.assert_allclose(each, float(place == 0), atol=1e-6, err_msg=f"{layer} {place}")


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_a_counter_set_by_hand_gives_an_exact_table() -> None:
    """One more of the counted stands at place n - 1; the other places are alike in both runs."""
    found, result = recovered(COUNTED, own_models.counter())
    counts = [int(n) for n in result.row_values["n"]]
    assert sorted(counts) == [2, 3, 4]
    for (layer, place), each in found.items():
        expected = [float(place == n - 1) for n in counts]
        np.testing.assert_allclose(each, expected, atol=1e-6, err_msg=f"{layer} {place}")


# --- positions and the beginning of texts -------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_models_of_few_positions(count: int) -> None:
    model = taken(families.module("gpt2", n_positions=count))
    ids = [1, 9, 22, 31, 17, 40][:count]
    batch = Batch.of([ids], model.pad_id, "left", model.device)
    logits = run_full(model, batch).logits
    assert logits is not None
    expected = forward("gpt2", families.module("gpt2", n_positions=count), ids).logits
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-3)


def test_a_table_of_positions_counts_for_more_than_the_config() -> None:
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
def test_rows_of_a_table_that_are_kept_for_padding_are_no_positions(
    name: str, settings: dict[str, Any]
) -> None:
    taken(own_models.made(name, **settings))


def needs_bos(module: nn.Module) -> nn.Module:
    """The model refuses prompts that don't begin with token 1."""

    def look(part: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        first = torch.zeros_like(ids[:, 0]) if mask is None else mask.int().argmax(-1)
        if mask is None or mask.dim() == 2:
            assert (ids.gather(1, first[:, None]) == 1).all(), "a prompt begins with <s>"

    module.register_forward_pre_hook(look, with_kwargs=True)
    return module


def test_a_model_that_needs_the_beginning_of_a_text_gets_it() -> None:
    # Rows side by side begin in the middle of texts, which it refuses too.
    taken(needs_bos(families.module("gpt2")), None, "W0711")
    model, found = adopt_model("m", needs_bos(families.module("gpt2")), own_models.words())
    assert model is None
    assert "a prompt begins with <s>" in found[0].label_text


def test_the_second_time_the_parts_without_effect_are_known(
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


# --- heads of other kinds, and none -------------------------------------------------------------


@pytest.mark.parametrize("name", ["BertForTokenClassification", "GPT2ForTokenClassification"])
def test_labels_of_each_token_are_logits(name: str) -> None:
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


def test_more_logits_than_tokens() -> None:
    module: Any = families.module("gpt2", tie_word_embeddings=False)
    module.lm_head = nn.Linear(24, 60, bias=False)
    model = taken(module)
    assert model.shape.vocab_size == families.VOCABULARY
    assert model.shape.outputs == 60


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model"])
def test_a_model_without_a_head_has_no_logits(name: str) -> None:
    model = taken(own_models.made(name))
    assert "logits" not in model.shape.sites
    assert "resid_post" in model.shape.sites


# --- what stands around a model -----------------------------------------------------------------


def test_a_compiled_model_is_taken_as_it_was() -> None:
    module = families.module("gpt2")
    compiled: Any = torch.compile(module)
    assert taken(compiled).module is module


def test_a_hook_of_the_users_is_named_where_checks_fail() -> None:
    module: Any = families.module("gpt2")
    module.transformer.h[1].mlp.c_proj.register_forward_hook(lambda part, args, out: out * 0)
    model, found = adopt_model("m", module, families.tokenizer())
    assert model is None
    assert "a hook of yours on `transformer.h.1." in found[0].help_text


def test_too_little_memory_for_the_checks_is_no_wrong_anatomy() -> None:
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


def test_a_site_at_no_module_is_said_to_be_there() -> None:
    """An entry of a family that names a module which isn't there."""
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


def test_looking_at_the_first_token_writes_nothing(tmp_path: Path) -> None:
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
    """Adds nothing, and has no weights."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_a_block_of_attention_alone_needs_no_entry() -> None:
    module: Any = families.module("gpt2")
    for block in module.transformer.h:
        block.mlp = Nothing()
    model = taken(module)
    assert not {"mlp_norm", "mlp_hidden", "mlp_out", "resid_mid"} & model.shape.sites
    assert {"z", "pattern", "attn_out", "resid_post"} <= model.shape.sites
    assert model.restartable


def test_linear_maps_beside_attention_are_no_block_of_attention_alone() -> None:
    module: Any = families.module("gpt2")
    for block in module.transformer.h:
        block.mlp, block.thinking = Nothing(), nn.Linear(24, 24)
    model, found = adopt_model("m", module, families.tokenizer())
    assert model is None
    assert [(d.code, d.message) for d in found] == [
        ("E0409", "`m` (GPT2LMHeadModel): MLP not found")
    ]
