"""Encoder-decoders in files, against plain hooks for one unpadded prompt."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from mechdsl.base.text import Source
from mechdsl.diagnostics.rendering import render_full
from mechdsl.diagnostics.rules import NotInDecoder
from mechdsl.models.config import shape_from_config
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.value_keys import RunContents
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun, RunRow

from ..quick import some
from ..run_source import run_source
from .encoder_decoders import (
    CONFIGS,
    ENCODER_LAYERS,
    HEADS,
    LAYERS,
    T5,
    T5GEMMA,
    Text,
    cases,
    copied,
    difference,
    logits,
    model,
    place,
    read,
    run,
    starts,
    text,
    tokenizer,
    weights_times,
    zeroed,
)
from .support import (
    DIFFERENCE,
    PROMPTS,
    ROWS,
    WITHOUT_PLAN,
    Array,
    bare,
    by_name,
    experiment,
    token,
    try_file,
)

FAMILIES = cases(CONFIGS)


def values(family: str, folder: Path, *lines: str, options: RunOptions | None = None) -> Array:
    """[cell, prompt] of an experiment with a single measure."""
    found = run(family, experiment("e", *lines, DIFFERENCE), folder, options)["e"]
    return found.measures[0].patched - found.measures[0].base


def clean(family: str, name: str = "clean") -> Array:
    return np.array([difference(logits(family, text(row, name)), row) for row in ROWS])


@pytest.mark.parametrize("options", [RunOptions(), WITHOUT_PLAN], ids=["planned", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("site", "layers"),
    [
        ("resid_post encoder", ENCODER_LAYERS),
        ("resid_pre encoder", ENCODER_LAYERS),
        ("mlp_out encoder", ENCODER_LAYERS),
        ("attn_out encoder", ENCODER_LAYERS),
    ],
)
def test_patch_encoder_equals_hooks(
    family: str, site: str, layers: int, options: RunOptions, tmp_path: Path
) -> None:
    lines = ("prompts p", "from other into clean", f"patch {site} layer * at subject token")
    found = values(family, tmp_path, *lines, options=options)
    expected = []
    for layer in range(layers):
        own = place(family, site, layer)
        row = []
        for n, record in enumerate(ROWS):
            base, source = text(record), text(record, "other")
            write = copied(family, source, own, base.subject[-1:], source.subject[-1:])
            row.append(difference(logits(family, base, [write]), record) - clean(family)[n])
        expected.append(row)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_of_an_encoder_without_layers_equal_hooks(family: str, tmp_path: Path) -> None:
    """`embed encoder` and `final_norm encoder`, in two experiments of a file."""
    sites = ("embed encoder", "final_norm encoder")
    found = run(
        family,
        "".join(
            experiment(
                f"e{n}",
                "prompts p",
                "from other into clean",
                f"patch {site} at subject token",
                DIFFERENCE,
            )
            for n, site in enumerate(sites)
        ),
        tmp_path,
    )
    for n, site in enumerate(sites):
        own, expected = place(family, site, 0), []
        for record in ROWS:
            base, source = text(record), text(record, "other")
            write = copied(family, source, own, base.subject[-1:], source.subject[-1:])
            expected.append(difference(logits(family, base, [write]), record))
        measure = found[f"e{n}"].measures[0]
        np.testing.assert_allclose(measure.patched[0], expected, atol=2e-4)
        assert np.abs(expected - measure.base[0]).max() > 0.02


HEAD_SITES = ("z encoder", "v encoder", "q encoder", "z", "v", "z cross", "q cross")
"""Sites with heads; keys and values of `cross` are at the encoder's tokens."""


def at(site: str) -> str:
    return "last token"


HEADS_PATCHED = [*HEAD_SITES, "v cross", "k cross"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", some(HEADS_PATCHED, HEADS_PATCHED[::2]))
def test_heads_equal_hooks(family: str, site: str, tmp_path: Path) -> None:
    encoded = "encoder" in site or site in ("v cross", "k cross")
    lines = ("prompts p", "from other into clean", f"patch {site} layer * head * at last token")
    found = values(family, tmp_path, *lines)
    expected = []
    for layer in range(ENCODER_LAYERS if "encoder" in site else LAYERS):
        for head in range(HEADS):
            own, row = place(family, site, layer, head), []
            for n, record in enumerate(ROWS):
                base, source = text(record), text(record, "other")
                last = len(starts(family)) - 1
                to, of = ([base.last], [source.last]) if encoded else ([last], [last])
                write = copied(family, source, own, to, of)
                row.append(difference(logits(family, base, [write]), record) - clean(family)[n])
            expected.append(row)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["mlp_out encoder", "resid_post", "attn_out cross", "mlp_out"])
def test_ablation_of_joined_tokens_equals_hooks(family: str, site: str, tmp_path: Path) -> None:
    encoded = "encoder" in site
    where = "item tokens" if encoded else "tokens *"
    layers = ENCODER_LAYERS if encoded else LAYERS
    found = values(family, tmp_path, "prompts p", f"ablate {site} layer * at {where} with zero")
    expected = []
    for layer in range(layers):
        own, row = place(family, site, layer), []
        for n, record in enumerate(ROWS):
            base = text(record)
            tokens = base.items if encoded else range(len(starts(family)))
            write = zeroed(own, tokens)
            row.append(difference(logits(family, base, [write]), record) - clean(family)[n])
        expected.append(row)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fill", ["mean", "mean of clean"])
def test_mean_ablation_at_both_sides_equals_hooks(family: str, fill: str, tmp_path: Path) -> None:
    lines = f"ablate attn_out encoder layer 1 at last token with {fill}".removesuffix(" of clean")
    found = values(family, tmp_path, "prompts p", lines)
    own = place(family, "attn_out encoder", 1)
    texts = [text(row) for row in ROWS]
    mean = torch.stack([read(family, each, own)[each.last] for each in texts]).mean(0)
    expected = [
        difference(logits(family, each, [(own, [each.last], lambda _: mean[None])]), row)
        for each, row in zip(texts, ROWS, strict=True)
    ]
    np.testing.assert_allclose(found[0], np.array(expected) - clean(family), atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["resid_post encoder", "resid_post"])
def test_steering_along_a_fitted_direction_equals_hooks(
    family: str, site: str, tmp_path: Path
) -> None:
    where = "subject token" if "encoder" in site else "last token"
    text_of = (
        f"direction d = mean_difference(p, p.other) at {site} layer 1 at {where}\n"
        + experiment("e", "prompts p", f"add 2.0 * d to {site} layer 1 at {where}", DIFFERENCE)
    )
    found = run(family, text_of, tmp_path)["e"].measures[0]
    own = place(family, site, 1)

    def at(name: str, record: Any) -> int:
        each = text(record, name)
        return each.subject[-1] if "encoder" in site else len(starts(family)) - 1

    means = [
        torch.stack([read(family, text(row, name), own)[at(name, row)] for row in ROWS]).mean(0)
        for name in ("clean", "other")
    ]
    step = 2.0 * (means[0] - means[1])
    expected = [
        difference(
            logits(family, text(row), [(own, [at("clean", row)], lambda old: old + step)]), row
        )
        for row in ROWS
    ]
    np.testing.assert_allclose((found.patched - found.base)[0], expected - clean(family), atol=5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_rules_and_a_text_of_several_tokens_equal_hooks(
    family: str, tmp_path: Path
) -> None:
    prompts = PROMPTS.replace('answer " {a}"', 'answer " {a} {b} {cue}"')
    lines = experiment(
        "e",
        "prompts p",
        "from longer into clean",
        "patch z encoder layer 1 head 0 at last token",
        "ablate z cross layer 2 head 1 at last token with zero",
        "scale mlp_out layer 0 at last token by 3",
        "measure logprob(answer) as delta",
    )
    ran = try_file(lines, tmp_path, model(family), None, tokenizer=tokenizer(), prompts=prompts)
    found = by_name(*ran)["e"].measures[0]
    last = len(starts(family)) - 1

    def logprob(record: Any, writes: Any = ()) -> float:
        answer = [token(record[name]) for name in ("a", "b", "cue")]
        given = logits(family, text(record), writes, answer[:-1])[last:]
        scores = torch.tensor(given).log_softmax(-1)
        return float(sum(scores[n, each] for n, each in enumerate(answer)))

    expected = []
    for record in ROWS:
        base, source = text(record), text(record, "longer")
        writes = [
            copied(family, source, place(family, "z encoder", 1, 0), [base.last], [source.last]),
            zeroed(place(family, "z cross", 2, 1), [last]),
            (place(family, "mlp_out", 0), [last], lambda old: 3 * old),
        ]
        expected.append(logprob(record, writes) - logprob(record))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose((found.patched - found.base)[0], expected, atol=5e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_transplant_from_other_prompts_equals_hooks(family: str, tmp_path: Path) -> None:
    more = PROMPTS + PROMPTS.replace("prompts p", "prompts o").replace("w40", "w44")
    lines = experiment(
        "e",
        "prompts p",
        "from o into p",
        "patch resid_post encoder layer 0 at subject token onto last token",
        DIFFERENCE,
    )
    ran = try_file(lines, tmp_path, model(family), None, tokenizer=tokenizer(), prompts=more)
    found = by_name(*ran)["e"].measures[0]
    own, expected = place(family, "resid_post encoder", 0), []
    for record in ROWS:
        base = text(record)
        source = replace(
            base, ids=tuple(token("w44") if i == token("w40") else i for i in base.ids)
        )
        write = copied(family, source, own, [base.last], base.subject[-1:])
        expected.append(difference(logits(family, base, [write]), record))
    np.testing.assert_allclose((found.patched - found.base)[0], expected - clean(family), atol=2e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_shared_first_token_of_answers_moves_to_the_decoder(family: str, tmp_path: Path) -> None:
    prompts = PROMPTS.replace('" {a}"', '" w30 {a}"').replace('" {b}"', '" w30 {b}"')
    lines = experiment(
        "e", "prompts p", "ablate mlp_out encoder layer 0 at item tokens with zero", DIFFERENCE
    )
    ran = try_file(lines, tmp_path, model(family), None, tokenizer=tokenizer(), prompts=prompts)
    found, own = by_name(*ran)["e"].measures[0], place(family, "mlp_out encoder", 0)
    expected = [
        difference(logits(family, text(row), [zeroed(own, text(row).items)], [token("w30")]), row)
        for row in ROWS
    ]
    np.testing.assert_allclose(found.patched[0], expected, atol=2e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_top_heads_loops_and_replaced_tokens_equal_hooks(family: str, tmp_path: Path) -> None:
    prompts = PROMPTS.replace(
        "corrupt turned", 'corrupt masked { replace subject tokens with "w44" }\n  corrupt turned'
    )
    lines = experiment(
        "heads",
        "prompts p",
        "from masked into clean",
        "for c in [z, v] { patch c encoder layer * head * at last token }",
        DIFFERENCE,
    ) + experiment(
        "best",
        "prompts p",
        "from masked into clean",
        "patch top 3 of heads at last token",
        DIFFERENCE,
    )
    ran = try_file(lines, tmp_path, model(family), None, tokenizer=tokenizer(), prompts=prompts)
    results = by_name(*ran)
    swept = results["heads"].measures[0]
    names = [cell.coords for cell in results["heads"].cells]
    expected, writes = [], []
    texts = [(text(row), masked(row)) for row in ROWS]
    for coords in names:
        own = place(family, f"{coords['c']} encoder", int(coords["layer"]), int(coords["head"]))
        writes.append(
            [copied(family, other, own, [base.last], [other.last]) for base, other in texts]
        )
        expected.append(
            [
                difference(logits(family, base, [write]), row)
                for row, (base, _), write in zip(ROWS, texts, writes[-1], strict=True)
            ]
        )
    np.testing.assert_allclose(swept.patched, expected, atol=2e-4)
    mean = (np.array(expected) - clean(family)).mean(1)
    top = np.argsort(-mean)[:3]
    joint = [
        difference(logits(family, base, [writes[n][row] for n in top]), ROWS[row])
        for row, (base, _) in enumerate(texts)
    ]
    np.testing.assert_allclose(results["best"].measures[0].patched[0], joint, atol=2e-4)


def masked(record: Any) -> Text:
    """A row whose subject is one other word."""
    base, first, last = text(record), *(text(record).subject[i] for i in (0, -1))
    ids = (*base.ids[:first], token("w44"), *base.ids[last + 1 :])
    return Text(ids, base.items, (first,))


ERRORS = {
    "patch resid_post layer 1 at item token": "E0316",
    'patch z cross layer 1 head 0 at "w40" token': "E0316",
    "patch resid_post encoder layer 1 at subject token onto answer token": "E0540",
    "patch resid_post encoder layer 2 at last token": "E0302",
    "patch mlp_out cross layer 1 at last token": "E0413",
    "patch resid_post encode layer 1 at last token": "E0203",
    "for c in [v, z] { patch c cross layer 1 head * at last token }": "E0317",
    "block attention cross layer 0 from item token to last token": "E0316",
    "allow attention encoder layer 0 from first token to last token": "E0332",
    "allow attention encoder layer 0 from last token to first token": "E0332",
    "allow attention cross layer 0 from last token to first token": "E0332",
    "replace block cross layer 1 with identity": "E0207",
    "scale weights of z layer 0 head 0 by 2": "E0108",
    "observe rollout from last token to subject tokens": "E0108",
    "observe attention cross layer 0 from last token to subject tokens by value_norm": "E0108",
    "observe direct_logit attn_out layer * toward answer at last token": "E0108",
    "observe logit_lens resid_post encoder layer * at last token": "E0207",
    "observe distance pattern cross layer 0 head 0 at last token": "E0207",
    "observe received pattern cross layer 0 head 0 at last token": "E0207",
    "observe similarity z encoder layer 0 head 0 with z layer 0 head 0 at last token": "E0317",
    "add value(resid_post encoder layer 0) to resid_post layer 1 at item token": "E0316",
    "add value(resid_post encoder layer 0) to resid_post layer 1 at last token": "E0317",
    "add value(resid_post encoder layer 0) to resid_post layer 1 at tokens *": "E0317",
    "set resid_post encoder layer 0 at last-item token to value(mlp_out layer 0)": "E0317",
    "set resid_post layer 0 at last token to value(mlp_out layer 0 at item token)": "E0316",
    "add 2 * step(k) to q encoder layer 0 head 0 at last token": "E0341",
    "patch q cross layer 0 head 0 at last token\n  using cdt": "E0608",
    "patch k encoder layer 0 head 0 at last token\n  using cdt": "E0608",
    "patch pattern cross layer 0 head 0 at last token\n  using atp": "E0608",
    "observe norm resid_post encoder layer * at last token\n  save gradient of logit(answer) by "
    'pattern cross layer 0 at last token to "x.safetensors"': "E0608",
}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("patch resid_post layer 1 at item token", "the encoder reads `item`"),
        ("patch resid_post layer 1 at token 3", "the decoder begins with 1 token,"),
        ("patch z cross_attention layer 1 head 0 at last token", "did you mean `cross`"),
    ],
)
def test_invalid_position_reports_the_tokens_of_the_decoder(
    line: str, told: str, tmp_path: Path
) -> None:
    lines = experiment("e", "prompts p", line, "from other into clean", DIFFERENCE)
    found = try_file(lines, tmp_path, model("t5"), tokenizer=tokenizer())[1]
    assert told in render_full([*found], color=False, width=200)


@pytest.mark.parametrize(("line", "code"), ERRORS.items())
def test_invalid_line_reports_the_code_before_anything_runs(
    line: str, code: str, tmp_path: Path
) -> None:
    measures = () if line.startswith("observe") else ("from other into clean", DIFFERENCE)
    lines = experiment("e", "prompts p", line, *measures)
    _, found = try_file(lines, tmp_path, model("t5"), None, tokenizer=tokenizer())
    (problem,) = [each for each in found if each.severity == "error"]
    assert problem.code == code


def test_vector_over_keys_of_a_longer_text_reports_e0333(tmp_path: Path) -> None:
    line = "patch pattern encoder layer 0 head 0 at last token"
    lines = experiment("e", "prompts p", "from longer into clean", line, DIFFERENCE)
    _, found = try_file(lines, tmp_path, model("t5"), None, tokenizer=tokenizer())
    assert [each.code for each in found if each.severity == "error"] == ["E0333"]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_replaced_tokens_equal_the_other_text(family: str, tmp_path: Path) -> None:
    ablate = "ablate z cross layer 0 head 1 at last token with zero"
    own, last = place(family, "z cross", 0, 1), [len(starts(family)) - 1]
    subject, cue = [], []
    for row in ROWS:
        base = text(row)
        at = base.subject[-1] + 2
        other = replace(base, ids=(*base.ids[:at], token("w44"), *base.ids[at + 1 :]))
        subject.append(difference(logits(family, masked(row)), row))
        cue.append(difference(logits(family, other, [zeroed(own, last)]), row))
    for lines, expected in (
        (['replace subject tokens with "w44"'], subject),
        (['replace cue token with "w44"', ablate], cue),
    ):
        found = values(family, tmp_path, "prompts p", *lines)[0] + clean(family)
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_stack_of_a_decoder_only_model_reports_e0413(tmp_path: Path) -> None:
    lines = ("prompts p", "ablate z cross layer 1 head 0 at last token with zero", DIFFERENCE)
    _, found = try_file(experiment("e", *lines), tmp_path, bare("gpt2"))
    assert [each.code for each in found if each.severity == "error"] == ["E0413"]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_folder_gives_the_values_of_the_model(family: str, tmp_path: Path) -> None:
    model(family).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    line = "ablate z cross layer * head * at last token with zero"
    expected = values(family, tmp_path, "prompts p", line)
    body = experiment("e", "prompts p", line, DIFFERENCE)
    source = Source(f'mech 1\nmodel m = local("model")\n{PROMPTS}\n{body}', tmp_path / "f.mech")
    found = by_name(*run_source(source, RunOptions()))["e"].measures[0]
    np.testing.assert_allclose(found.patched - found.base, expected, atol=1e-6)


def test_unknown_first_token_of_the_decoder_reports_e0408(tmp_path: Path) -> None:
    made = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", **{**T5, "decoder_start_token_id": None})
    )
    lines = ("prompts p", "ablate z layer 1 head 0 at last token with zero", DIFFERENCE)
    _, found = try_file(experiment("e", *lines), tmp_path, made, tokenizer=tokenizer())
    assert [each.code for each in found if each.severity == "error"] == ["E0408"]


def test_t5gemma_begins_with_the_bos_token_of_its_decoder(tmp_path: Path) -> None:
    """As its class shifts labels. A `decoder_start_token_id` in the config takes precedence."""
    config = {**T5GEMMA, "bos_token_id": 7, "decoder": {**T5GEMMA["decoder"], "bos_token_id": 4}}
    lines = ("prompts p", "ablate z layer 1 head 0 at last token with zero", DIFFERENCE)
    found: dict[int | None, Array] = {}
    for start in (None, 4, 6):
        made = AutoModelForSeq2SeqLM.from_config(
            AutoConfig.for_model("t5gemma", **{**config, "decoder_start_token_id": start})
        )
        made.load_state_dict(model("t5gemma").state_dict())
        if start is None:
            shifted = made.prepare_decoder_input_ids_from_labels(torch.tensor([[9]]))
            assert shifted.tolist() == [[4]]
        result, problems = try_file(experiment("e", *lines), tmp_path, made, tokenizer=tokenizer())
        assert result is not None, problems
        found[start] = by_name(result, problems)["e"].measures[0].patched
    np.testing.assert_array_equal(found[None], found[4])
    assert np.abs(found[4] - found[6]).max() > 1e-3


def test_row_key_depends_on_the_split_between_encoder_and_decoder() -> None:
    row = RunRow("", (5, 6, 7), ((0, 0),) * 3, (False,) * 3, (), {}, {})
    keys = set()
    for source in (0, 1, 2):
        run = PromptRun("clean", (replace(row, source=source),))
        table = PromptTable("p", (0,), (1,), {"clean": run})
        keys.add(int(RunContents({"m": b"identity"}, "m", 0).of(run, table)[0]))
    assert len(keys) == 3


def edges_of(stack: str, family: str, of: Text) -> tuple[int, tuple[int, ...]]:
    """The query, and the keys: subject tokens, or the first token of the decoder."""
    last = len(starts(family)) - 1
    return (of.last if stack == "encoder" else last), ((0,) if not stack else of.subject)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stack", ["encoder", "cross", ""])
@pytest.mark.parametrize(("verb", "factor"), [("block", 0.0), ("reweight", 2.5)])
def test_attention_edges_equal_written_out_attention(
    family: str, stack: str, verb: str, factor: float, tmp_path: Path
) -> None:
    if not stack and len(starts(family)) == 1:
        pytest.skip("its decoder begins with one token, which has no other key")
    keys = "subject tokens" if stack else "first token"
    by = f" by {factor}" if factor else ""
    line = f"{verb} attention {stack} layer * head * from last token to {keys}{by}"
    found = values(family, tmp_path, "prompts p", " ".join(line.split()))
    expected = []
    for layer in range(ENCODER_LAYERS if stack == "encoder" else LAYERS):
        for head in range(HEADS):
            row = []
            for record in ROWS:
                base = text(record)
                query, own = edges_of(stack, family, base)
                edges = [(head, query, key) for key in own]
                with weights_times(family, stack, layer, edges, factor):
                    row.append(difference(logits(family, base), record))
            expected.append(row - clean(family))
    np.testing.assert_allclose(found, expected, atol=5e-4)
    if stack:
        assert np.abs(expected).max() > 0.02


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stack", ["encoder", "cross"])
def test_observed_attention_equals_written_out_attention(
    family: str, stack: str, tmp_path: Path
) -> None:
    line = f"observe attention {stack} layer * head * from last token to subject tokens"
    lines = experiment("e", "prompts p", line)
    found = run(family, lines, tmp_path)["e"].measures[0].patched
    expected = []
    for layer in range(ENCODER_LAYERS if stack == "encoder" else LAYERS):
        seen: list[list[torch.Tensor]] = []
        for record in ROWS:
            base, weights = text(record), []
            with weights_times(family, stack, layer, seen=weights):
                written_out = logits(family, base)
            np.testing.assert_allclose(written_out, logits(family, base), atol=1e-4)
            query, keys = edges_of(stack, family, base)
            seen.append([weights[0][head, query, list(keys)].sum() for head in range(HEADS)])
        expected += [[float(each[head]) for each in seen] for head in range(HEADS)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_blocked_encoder_and_patched_cross_heads_act_together(tmp_path: Path) -> None:
    lines = (
        "prompts p",
        "from other into clean",
        "block attention encoder layers * heads * from last token to item tokens",
        "block attention cross layer 1 head 0 from last token to subject tokens",
        "patch v cross layer 2 head 1 at last token",
    )
    found = values("t5", tmp_path, *lines)[0]
    expected = []
    for record in ROWS:
        base, source = text(record), text(record, "other")
        write = copied("t5", source, place("t5", "v cross", 2, 1), [base.last], [source.last])
        edges = [(head, base.last, key) for head in range(HEADS) for key in base.items]
        with ExitStack() as stack:
            for layer in range(ENCODER_LAYERS):
                stack.enter_context(weights_times("t5", "encoder", layer, edges))
            own = [(0, 0, key) for key in base.subject]
            stack.enter_context(weights_times("t5", "cross", 1, own))
            expected.append(difference(logits("t5", base, [write]), record))
    np.testing.assert_allclose(found, expected - clean("t5"), atol=5e-4)


@pytest.mark.parametrize("family", [*CONFIGS])
def test_config_without_is_encoder_decoder_has_the_shape_of_its_class(family: str) -> None:
    """transformers takes the class's default for a missing key, and so loads an encoder-decoder."""
    config = model(family).config.to_dict()
    shape, problems = shape_from_config(config)
    assert shape is not None
    assert (shape.takes, problems) == ("two texts", [])
    del config["is_encoder_decoder"]
    assert shape_from_config(config) == (shape, [])


@pytest.mark.parametrize(
    ("key", "name"),
    [("t5", "T5EncoderModel"), ("bart", "BartForCausalLM"), ("funnel", "FunnelForMaskedLM")],
)
def test_config_of_one_stack_without_is_encoder_decoder_stays_one_stack(
    key: str, name: str
) -> None:
    config = {**AutoConfig.for_model(key, vocab_size=50).to_dict(), "architectures": [name]}
    config.pop("is_encoder_decoder", None)
    shape, _ = shape_from_config(config)
    assert shape is None or shape.takes == "text"


def test_text_of_a_measure_in_the_decoder_is_named_in_e0316(tmp_path: Path) -> None:
    """The encoder reads the subject, but not the text of `logprob(wrong)`."""
    for name, reason in (("wrong", "the prompt doesn't contain"), ("subject", "the encoder reads")):
        line = f"scale resid_post layer 0 at {name} tokens by -1"
        lines = experiment("e", "prompts p", line, "measure logprob(wrong) as raw")
        _, found = try_file(lines, tmp_path, model("t5"), None, tokenizer=tokenizer())
        (problem,) = [each for each in found if each.severity == "error"]
        assert isinstance(problem, NotInDecoder)
        assert problem.reader == reason
        assert ("`answer tokens`" in str(problem)) == (name == "wrong")
