"""`from tuned into m`, `model a, b` and checkpoints, against reference runs of single prompts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ..execute.support import (
    DIFFERENCE,
    MODES,
    ROWS,
    Prompt,
    by_name,
    experiment,
    fast,
    prompts,
    token,
)
from ..models import families
from ..quick import in_turn
from ..reference.forward import Write
from ..reference.points import Point, copied
from .support import attempt, by_prompt, layers, models, run, same, unpatched

FAMILIES = ("gpt2", "llama", "gpt_neox")
EVERY = slice(None)


def across(*lines: str) -> str:
    """An experiment without a `model` line."""
    return experiment("e", *lines).replace("  model m\n", "")


@pytest.mark.parametrize(("mode", "family"), in_turn(list(MODES), FAMILIES))
def test_patch_from_another_model_equals_reference(folder: Path, family: str, mode: str) -> None:
    """Activations and source values come from the other model."""
    text = across(
        "prompts p", "from tuned into m", "patch resid_post layer * at subject token", DIFFERENCE
    )
    found = run(text, folder, models(family, "m", "tuned"), MODES[mode])["e"]
    assert found.model == "m"
    bases = prompts()
    where = [(b.subject[-1:], b.subject[-1:]) for b in bases]
    expected = by_prompt(family, layers("resid_post"), bases, bases, where, read="tuned")
    same(found.measures[0], expected, EVERY)
    assert "model tuned" in found.conventions
    assert found.hashes["model"] != found.hashes["model tuned"]


@pytest.mark.parametrize("site", ["embed", "z", "q", "mlp_hidden", "logits"])
def test_patch_between_models_with_equal_tokens_is_not_inert(folder: Path, site: str) -> None:
    """Cells that are inert within one model aren't inert between two models."""
    where = {"z": " layer 0 heads *", "q": " layer 0 heads *", "mlp_hidden": " layer 0"}
    text = across(
        "prompts p", "from tuned into m", f"patch {site}{where.get(site, '')} at tokens *",
        DIFFERENCE,
    )  # fmt: skip
    found = run(text, folder, models("llama", "m", "tuned"))["e"]
    bases = prompts()
    every = [(range(len(b.ids)), range(len(b.ids))) for b in bases]
    layer = 0 if site in where else None
    expected = by_prompt("llama", [[Point(site, layer)]], bases, bases, every, read="tuned")
    same(found.measures[0], expected, EVERY)
    if site == "logits":  # patched logits equal those of the other model
        np.testing.assert_allclose(found.measures[0].patched[0], expected[2], atol=1e-4)


def test_second_model_with_corruption_and_kl_equals_reference(folder: Path) -> None:
    """Covers `with tuned`, a corruption as the base, and the KL divergence to the other model."""
    text = experiment(
        "e", "prompts p", "from clean into other",
        "patch resid_post layer 0 at subject token",
        "patch mlp_out layer 2 at last token with tuned",
        DIFFERENCE, "measure kl(tuned) as delta", "expect accuracy(tuned) >= 0",
    ).replace("from clean into other", "from tuned into other")  # fmt: skip
    found = run(text, folder, models("gpt2", "m", "tuned"))["e"]
    from ..execute.support import difference
    from .support import patched

    for n, record in enumerate(ROWS):
        source, base = prompts()[n], prompts("other")[n]
        logits, seen = unpatched("gpt2", source, "tuned")
        edits = [
            *copied([Point("resid_post", 0)], seen, source.subject[-1:], base.subject[-1:]),
            *copied([Point("mlp_out", 2)], seen, (source.last,), (base.last,)),
        ]
        new = patched("gpt2", base, edits)
        assert abs(found.measures[0].patched[0, n] - difference(new, record)) < 1e-4
        reference, own = (x[-1].double().log_softmax(-1) for x in (logits, new))
        kl = float((reference.exp() * (reference - own)).sum())
        assert abs(found.measures[1].patched[0, n] - kl) < 1e-4
        best = int(logits[-1].argmax()) == token(record["a"])
        assert found.accuracy["tuned"][n] == float(best)


@pytest.mark.parametrize("metric", ["kl(tuned)", "distance"])
def test_kl_to_a_model_named_only_in_a_metric_equals_reference(folder: Path, metric: str) -> None:
    """Covers gradients and named metrics."""
    text = "metric distance = kl(tuned)\n" + experiment(
        "e", "prompts p", "ablate resid_post layer 0 at subject token with zero",
        f"measure {metric} as raw",
    )  # fmt: skip
    text += experiment(
        "g", "prompts p",
        f'save gradient of {metric} by resid_post layer 2 at last token to "g.safetensors"',
    )  # fmt: skip
    both = models("gpt2", "m", "tuned")
    result, problems = attempt(text, folder, both)
    assert result is not None, problems
    found = by_name(result, problems)["e"]
    from .support import patched

    for n, of in enumerate(prompts()):
        new = patched("gpt2", of, [zeroed(of)])
        p, q = (x[-1].double().log_softmax(-1) for x in (unpatched("gpt2", of, "tuned")[0], new))
        kl = float((p.exp() * (p - q)).sum())
        assert abs(found.measures[0].patched[0, n] - kl) < 1e-4
    assert "model tuned" in found.conventions
    gradients = load_file(result.saved[0].path)["resid_post.layer2"]
    assert gradients.norm(dim=1).min() > 1e-4


def zeroed(of: Prompt) -> Write:
    return Write("resid_post", 0, torch.zeros(()), of.subject[-1])


def test_kl_to_the_model_of_the_experiment_is_rejected(folder: Path) -> None:
    text = experiment("e", "prompts p", "measure kl(m) as raw")
    result, found = attempt(text, folder, models("gpt2", "m", "tuned"))
    assert result is None
    assert [each.code for each in found] == ["E0201"]


def test_kl_to_another_model_at_each_step_equals_reference(folder: Path) -> None:
    """Both models read the same completion."""
    from ..reference.forward import forward

    text = across(
        "prompts p", "from tuned into m", "patch resid_post layer 1 at cue token", "generate 3",
        "measure kl(tuned) at each step as raw",
    )  # fmt: skip
    both = models("gpt2", "m", "tuned")
    found = run(text, folder, both)["e"]
    for n, of in enumerate(prompts()):
        _, seen = unpatched("gpt2", of, "tuned")
        edits = list(copied([Point("resid_post", 1)], seen, (of.cue,), (of.cue,)))
        (reply,) = found.replies.cells[0][n]
        ids = [*of.ids, *reply.ids]
        own = forward("gpt2", both["m"], ids, edits).logits.double().log_softmax(-1)
        other = forward("gpt2", both["tuned"], ids).logits.double().log_softmax(-1)
        for step in range(3):
            p, q = other[of.last + step], own[of.last + step]
            kl = float((p.exp() * (p - q)).sum())
            assert abs(found.measures[0].patched[step, n] - kl) < 1e-4 * max(1, kl)


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_of_several_models_equal_reference(folder: Path, family: str) -> None:
    text = experiment(
        "e",
        "prompts p",
        "from other into clean",
        "patch z layer 1 head * at last token",
        DIFFERENCE,
    ).replace("model m", "model m, tuned")
    found = run(text, folder, models(family, "m", "tuned"))["e"]
    assert found.axes == ("model", "head")
    assert [cell.coords["model"] for cell in found.cells] == ["m"] * 4 + ["tuned"] * 4
    cells = [[Point("z", 1, head)] for head in range(4)]
    sources, bases = prompts("other"), prompts()
    where = [((s.last,), (b.last,)) for s, b in zip(sources, bases, strict=True)]
    for number, name in enumerate(("m", "tuned")):
        expected = by_prompt(family, cells, sources, bases, where, read=name, model=name)
        same(found.measures[0], expected, slice(4 * number, 4 * number + 4))
    assert set(found.runs) == {
        f"{run} ({name})" for run in ("clean", "other") for name in ("m", "tuned")
    }
    assert np.count_nonzero(~found.measures[0].inert) == 8


def test_models_of_different_depth_have_cells_for_their_layers(folder: Path) -> None:
    """Relative depths keep their written labels."""
    deep = families.module("llama", 3, num_hidden_layers=6)
    text = "".join(
        experiment(
            name, "prompts p", "from other into clean", f"patch resid_post {where} at last token",
            DIFFERENCE,
        ).replace("model m", "model m, deep")
        for name, where in (
            ("every", "layer *"), ("half", "layer 0%, 50%, 100%"), ("upper", "layer 50%..100%"),
            ("window", "layer 50% window 2"), ("joined", "layers 0%..50%"),
        )
    )  # fmt: skip
    found = run(text, folder, {**models("llama"), "deep": deep})
    coords = {
        name: [(c.coords["model"], c.coords.get("layer"), c.site) for c in each.cells]
        for name, each in found.items()
    }
    assert [c[:2] for c in coords["every"]] == [
        *(("m", n) for n in range(3)), *(("deep", n) for n in range(6)),
    ]  # fmt: skip
    assert coords["half"] == [
        ("m", "0%", "L0.resid_post"), ("m", "50%", "L1.resid_post"), ("m", "100%", "L2.resid_post"),
        ("deep", "0%", "L0.resid_post"), ("deep", "50%", "L3.resid_post"),
        ("deep", "100%", "L5.resid_post"),
    ]  # fmt: skip
    assert [c[:2] for c in coords["upper"]] == [
        ("m", "50%"), ("m", "100%"), ("deep", "60%"), ("deep", "80%"), ("deep", "100%"),
    ]  # fmt: skip
    assert coords["window"] == [
        ("m", None, "L0-1.resid_post"), ("deep", None, "L2-3.resid_post"),
    ]  # fmt: skip
    assert coords["joined"] == [
        ("m", None, "L0-1.resid_post"), ("deep", None, "L0-3.resid_post"),
    ]  # fmt: skip
    sources, bases = prompts("other"), prompts()
    where = [((s.last,), (b.last,)) for s, b in zip(sources, bases, strict=True)]
    expected = by_prompt("llama", layers("resid_post"), sources, bases, where)
    same(found["every"].measures[0], expected, slice(0, 3))
    same(found["half"].measures[0], expected, slice(0, 3))


def test_rows_kept_by_all_models_are_compared(folder: Path) -> None:
    """`keep` is evaluated for each model."""
    lines = ("prompts p", "from other into clean", "keep logit(answer) > logit(wrong)",
             "patch resid_post layer * at last token", DIFFERENCE)  # fmt: skip
    several = experiment("e", *lines).replace("model m", "model m, tuned")
    family = next(
        name for name in ("gpt2", "llama", "gpt_neox", "qwen2", "mistral") if _differ(name)
    )
    found = run(several, folder, models(family, "m", "tuned"))["e"]
    kept = [_kept(family, "m"), _kept(family, "tuned")]
    assert found.row_ids is not None
    assert set(found.row_ids) == kept[0] & kept[1]
    assert found.prompts == len(kept[0] & kept[1])
    assert "that all results have" in found.conventions["prompts"]


def _kept(family: str, model: str) -> set[int]:
    from ..execute.support import difference

    return {
        n
        for n, (of, record) in enumerate(zip(prompts(), ROWS, strict=True))
        if difference(unpatched(family, of, model)[0], record) > 0
    }


def _differ(family: str) -> bool:
    kept = [_kept(family, "m"), _kept(family, "tuned")]
    return kept[0] != kept[1] and len(kept[0] & kept[1]) > 0


def save(family: str, seed: int, folder: Path, **overrides: int) -> None:
    families.module(family, seed, **overrides).save_pretrained(folder)
    fast(families.tokenizer()).save_pretrained(folder)


@pytest.mark.slow
def test_checkpoints_are_models_in_natural_order(folder: Path) -> None:
    """Labels are the text matched by `*`, as numbers if all are numbers."""
    from mechdsl.base.text import Source

    from ..execute.support import PROMPTS
    from ..run_source import run_source

    for seed, step in enumerate((1000, 90, 200)):
        save("gpt2", seed, folder / "runs" / f"step-{step}")
    (folder / "runs" / "step-notes.txt").write_text("no folder", encoding="utf-8")
    text = experiment("e", "prompts p", "from other into clean", "patch resid_post layer 1 at "
                      "last token", DIFFERENCE).replace("model m", "model steps")  # fmt: skip
    text += (
        text.replace("experiment e", "experiment s")
        .replace("from other", "from steps")
        .replace("into clean", "into final")
        .replace("  model steps\n", "")
    )
    whole = (
        'mech 1\nmodel steps = local("runs/step-*")\nmodel final = local("runs/step-1000")\n'
        f"{PROMPTS}{text}"
    )
    result, found = run_source(Source(whole, folder / "file.mech"))
    assert result is not None, found
    steps, sources = result.experiments
    assert steps.axes == ("model",)
    assert [cell.coords["model"] for cell in steps.cells] == [90, 200, 1000]
    assert sources.axes == ("source",)
    assert [cell.coords["source"] for cell in sources.cells] == [90, 200, 1000]
    alone = whole.replace("model steps\n", "model final\n").split("experiment s")[0]
    alone = alone.replace('model steps = local("runs/step-*")\n', "")
    result, _ = run_source(Source(alone, folder / "file.mech"))
    assert result is not None
    one = result.experiments[0].measures[0].patched[0]
    np.testing.assert_allclose(steps.measures[0].patched[2], one, atol=1e-5)
    # The last checkpoint patched into itself changes nothing.
    np.testing.assert_allclose(
        sources.measures[0].patched[2], sources.measures[0].base[-1], atol=1e-4
    )


def test_model_line_that_is_neither_source_nor_base_is_rejected(folder: Path) -> None:
    text = experiment("e", "prompts p", "from tuned into m", "patch z layer 0 head 0 at last token",
                      DIFFERENCE).replace("model m", "model third")  # fmt: skip
    _, found = attempt(text, folder, models("gpt2", "m", "tuned", "third"))
    assert [d.code for d in found if d.severity == "error"] == ["E0207"]


def test_models_with_different_layers_or_tokens_are_rejected(folder: Path) -> None:
    from tokenizers import processors

    text = across("prompts p", "from tuned into m", "patch z layer 0 head 0 at last token",
                  DIFFERENCE)  # fmt: skip
    deep = families.module("gpt2", 3, n_layer=4)
    _, found = attempt(text, folder, {**models("gpt2"), "tuned": deep})
    errors = [d for d in found if d.severity == "error"]
    assert [d.code for d in errors] == ["E0415"]
    assert "4 and 3 layers" in errors[0].label_text
    bare = families.tokenizer()
    bare.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    _, found = attempt(text, folder, models("gpt2", "m", "tuned"), tokenizers={"tuned": fast(bare)})
    errors = [d for d in found if d.severity == "error"]
    assert [d.code for d in errors] == ["E0416"]
    assert errors[0].message.startswith("`tuned` and `m` tokenise the prompts differently")
    shown = re.search(r"begins with `(w\d+ w\d+) .*` and `<s> (w\d+ w\d+) ", errors[0].label_text)
    assert shown is not None
    assert shown[1] == shown[2]


def test_checkpoints_share_their_tokenizer_and_prompts(folder: Path) -> None:
    from mechdsl.base.text import Source
    from mechdsl.checks.file_check import check_source
    from mechdsl.diagnostics.core import has_errors

    from ..execute.support import PROMPTS

    for step in range(3):
        save("llama", step, folder / "runs" / str(step))
    lines = ("prompts p", "from clean into other", "patch z layer 0 head 0 at last token")
    text = experiment("e", *lines, DIFFERENCE).replace("model m", "model steps")
    whole = f'mech 1\nmodel steps = local("runs/*")\n{PROMPTS}{text}'
    checked = check_source(Source(whole, folder / "file.mech"))
    assert not has_errors(checked.diagnostics)
    assert [e.spec.variant for e in checked.experiments] == [(("model", n),) for n in range(3)]
    assert len({id(e.model.tokenizer) for e in checked.experiments}) == 1
    assert len({id(e.table) for e in checked.experiments}) == 1
    assert list(checked.program.models) == ["steps:0", "steps:1", "steps:2"]


def test_several_source_and_base_models_have_a_cell_per_pair(folder: Path) -> None:
    """A pair of equal models patches from the model's clean run."""
    text = across(
        "prompts p", "from tuned, third into m, tuned", "patch resid_post layer 1 at cue token",
        DIFFERENCE,
    )  # fmt: skip
    found = run(text, folder, models("gpt2", "m", "tuned", "third"))["e"]
    assert found.axes == ("source", "base")
    assert found.model == "m, tuned"
    bases = prompts()
    where = [((b.cue,), (b.cue,)) for b in bases]
    pairs = [(c.coords["source"], c.coords["base"]) for c in found.cells]
    assert pairs == [("tuned", "m"), ("tuned", "tuned"), ("third", "m"), ("third", "tuned")]
    for cell, (source, base) in enumerate(pairs):
        expected = by_prompt(
            "gpt2", layers("resid_post")[1:2], bases, bases, where,
            read=str(source), model=str(base),
        )  # fmt: skip
        if source == base:
            error = abs(found.measures[0].patched[cell] - expected[1]).max()
            assert error < 1e-4
            continue
        same(found.measures[0], expected, slice(cell, cell + 1))


def test_observation_of_the_own_model_uses_its_clean_run(folder: Path) -> None:
    """Covers observations and saved files, with one model and with several."""
    both = models("gpt2", "m", "tuned")
    seen = "observe norm resid_post layer 1 {}at last token as {}"
    text = experiment("both", "prompts p", seen.format("of tuned ", "x"), stats="").replace(
        "  model m\n", "  model m, tuned\n"
    )
    text += "".join(
        experiment(
            name, "prompts p", seen.format(run, f"{name}_norm"), line.format(run), stats=""
        ).replace("  model m\n", "  model tuned\n")
        for name, run, line in (
            ("own", "of tuned ", 'save resid_post layer 1 {}at last token to "a.safetensors"'),
            ("plain", "", 'save resid_post layer 1 {}at last token to "b.safetensors"'),
        )
    )
    result, problems = attempt(text, folder, both)
    assert result is not None, problems
    found = {each.name: each.measures[0].patched for each in result.experiments}
    np.testing.assert_allclose(found["own"], found["plain"])
    files = {each.path.name: load_file(each.path) for each in result.saved}
    first, second = (files[f"{name}.safetensors"]["resid_post.layer1"] for name in "ab")
    assert torch.equal(first, second)
