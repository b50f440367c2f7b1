"""Conventions that tables state about attention, paths, averages and comparisons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from mechdsl.results.document import experiment_document

from ..execute import support
from ..models import families

EDGES = "block attention layer * head * from last token to subject token"
PATTERN = "patch pattern layer 1 head * at last token with turned"
SDPA = "computed explicitly (eager) in layers 0 to 2 (the model uses `sdpa`)"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("rule", [EDGES, PATTERN])
def test_eager_and_fused_attention_agree(tmp_path: Path, family: str, rule: str) -> None:
    """A kernel without attention weights is replaced; the table states it, and values are equal."""
    fused = support.bare(family)
    eager = families.module(family, attn_implementation="eager")
    eager.load_state_dict(fused.state_dict())
    assert fused.config._attn_implementation == "sdpa"
    text = support.experiment("e", "prompts p", rule, support.DIFFERENCE)
    one = support.run_file(text, tmp_path, fused)["e"]
    other = support.run_file(text, tmp_path, eager)["e"]
    np.testing.assert_allclose(one.measures[0].patched, other.measures[0].patched, atol=1e-4)
    assert np.nanmax(np.abs(one.measures[0].patched - one.measures[0].base)) > 0.1
    if rule == EDGES:
        assert one.conventions["attention"] == SDPA
        assert other.conventions["attention"] == "computed explicitly (eager) in layers 0 to 2"
        assert one.conventions["edges"].startswith("blocked keys get no weight")
    with torch.no_grad():  # the model is unchanged
        ids = torch.tensor([support.prompt(support.ROWS[0]).ids])
        assert torch.equal(fused(ids).logits, support.bare(family)(ids).logits)
    assert fused.config._attn_implementation == "sdpa"


def test_conventions_state_which_components_a_path_holds(tmp_path: Path) -> None:
    lines = ("prompts p", "from turned into clean")
    text = support.experiment(
        "e", *lines, "path layer * head * -> q layer * head * at tokens *", support.DIFFERENCE
    ) + support.experiment(
        "f", *lines, "path layer * head 0 -> logits at last token through mlps", support.DIFFERENCE
    )
    found = support.run_file(text, tmp_path, support.bare("llama"))
    assert found["e"].conventions["path"] == (
        "except for the senders, the heads (z) of layers 0 to 2 and the MLPs (mlp_out) of "
        "layers 0 to "
        "2 are held at the base run, norms recomputed; receivers are then written into the base run"
    )
    assert found["e"].conventions["pairs"].startswith("48 of 144; ")
    assert len(found["e"].cells) == 48
    assert found["f"].conventions["path"] == (
        "except for the senders, the heads (z) of layers 0 to 2 are held at the base run, MLPs and "
        "norms recomputed"
    )
    assert "pairs" not in found["f"].conventions


def test_conventions_of_a_path_name_mixers_of_a_model_without_heads(tmp_path: Path) -> None:
    """Its blocks have no MLPs either."""
    torch.manual_seed(0)
    vocab = support.bare("llama").config.vocab_size
    size = MambaConfig(vocab_size=vocab, hidden_size=16, num_hidden_layers=2, state_size=4)
    lines = ("prompts p", "from turned into clean", "path resid_pre layer 0 -> logits at tokens *")
    text = support.experiment("e", *lines, support.DIFFERENCE)
    found = support.run_file(text, tmp_path, MambaForCausalLM(size).eval())["e"]
    assert found.conventions["path"] == (
        "except for the senders, the mixers (mixer_out) of layers 0 to 1 are held at the base run, "
        "norms recomputed"
    )


def test_conventions_of_an_estimated_path_write_receivers_only_in_verified_cells(
    tmp_path: Path,
) -> None:
    lines = (
        "prompts p",
        "from turned into clean",
        "path layer 0 head * -> q layer 2 head 1 at last token",
    )
    text = support.experiment("e", *lines, "using eap", support.DIFFERENCE)
    text += support.experiment("f", *lines, "using eap verify top 2", support.DIFFERENCE)
    found = support.run_file(text, tmp_path, support.bare("llama"))
    held = found["e"].conventions["path"]
    assert held.endswith("are held at the base run, norms recomputed")
    written = "; in cells that `verify` runs, receivers are then written into the base run"
    assert found["f"].conventions["path"] == held + written


def test_conventions_state_averaged_rows_and_compared_positions(tmp_path: Path) -> None:
    """The convention of `loss` is tested in `tests/execute/test_metrics.py`."""
    lines = ("prompts p", "from turned into clean", "patch L1H1 at subject token")
    rows = "the rows of clean after `limit` and `keep`"
    fill = "ablate L1H1 at last token with"
    look = "from last token to each item token"
    text = "".join(
        support.experiment(name, *own)
        for name, own in {
            "last": (*lines, "measure cosine(L1.resid, clean) as delta"),
            "there": (*lines, "measure cosine(L1.resid, clean) at subject token as delta"),
            "mean": ("prompts p", "keep prob(answer) > 0", f"{fill} mean", support.DIFFERENCE),
            "resample": ("prompts p", f"{fill} resample", support.DIFFERENCE),
            "heads": ("prompts p", f"observe attention layer * head * {look}"),
            "all": ("prompts p", f"observe attention layer * {look}"),
            "joined": ("prompts p", f"observe attention layers 0..1 heads 0, 1 {look}"),
        }.items()
    )
    found = support.run_file(text, tmp_path, support.bare("llama"))
    said = {name: each.conventions for name, each in found.items()}
    where = "compared at `{}`, where the metric reads, not where rules write"
    assert said["last"]["cosine"] == where.format("last token")
    assert said["there"]["cosine"] == where.format("subject token")
    assert said["mean"]["fill"] == f"mean over {rows}, per position"
    assert "the rows after `limit` and `keep`" in said["resample"]["fill"]
    weight = "the total weight of the keys"
    assert said["heads"]["observed"] == weight
    assert said["all"]["observed"] == f"{weight}, averaged over all heads"
    assert said["joined"]["observed"] == f"{weight}, averaged over these layers and these heads"


def test_each_item_position_adds_an_item_coordinate(tmp_path: Path) -> None:
    """`each item token` promises `item`: the JSON, data frames and expectations have it."""
    rule = "observe attention layer 1 from last token to each item token"
    expect = "expect attention(item: 2) >= 0\n  expect mean(attention, item: 2..3) >= 0"
    text = support.experiment("e", "prompts p", rule, expect)
    plain = "observe attention layer * from last token to cue token"
    text += support.experiment("f", "prompts p", plain)
    found = support.run_file(text, tmp_path, support.bare("llama"))
    document = experiment_document(found["e"])
    assert document.axes == ["position"]
    wanted = [{"item": n, "position": f"item {n}"} for n in range(1, 6)]
    assert [cell.coords for cell in document.cells] == wanted
    assert [record["item"] for record in found["e"].records()] == [1, 2, 3, 4, 5]
    assert all("item" not in cell.coords for cell in experiment_document(found["f"]).cells)
    one, some = found["e"].outcomes
    means = found["e"].statistics[0].mean
    assert one.value == pytest.approx(means[1])
    assert some.value == pytest.approx(means[1:3].mean(), rel=0.2)
