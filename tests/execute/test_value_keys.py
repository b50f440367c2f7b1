"""Keys of values: each change that may change a number gives new values, and no other change does.
Each file runs on a store with the values of all others."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.rows import RaggedColumn
from mechdsl.planner.value_keys import mix_numbers, number_lists
from mechdsl.results.experiment_result import FileResult
from mechdsl.store.store import Store

from ..quick import some
from . import support
from .support import DIFFERENCE, PROMPTS, ROWS, experiment
from .test_stored_values import arrays, close, same_bits

NOISED = PROMPTS.rstrip().removesuffix("}") + (
    "  corrupt noised { add gaussian(std: 0.5, samples: 2) to embed at subject tokens }\n}\n"
)
PROB = "measure prob(answer) as raw"
TWO_TEXTS = ("answer", "wrong")
ATTENTION = "attention layer 1 head 1 from last token to"


def one(
    rule: str,
    *lines: str,
    ends: str = "from other into clean",
    measures: tuple[str, ...] = (DIFFERENCE,),
) -> str:
    measures = tuple(line for line in lines if line.startswith("measure")) or measures
    others = [line for line in lines if not line.startswith("measure")]
    return experiment("e", "prompts p", ends, *others, rule, *measures)


def ablated(fill: str, *lines: str) -> str:
    rule = f"ablate z layer 1 head 1 at subject token with {fill}"
    return one(rule, *lines, ends="from clean into other")


PATCH = one("patch resid_post layer 1 at subject token")
DIFFERENT: dict[str, list[str]] = {
    "runs": [
        PATCH,
        one("patch resid_post layer 1 at subject token", ends="from turned into clean"),
        one("patch resid_post layer 1 at subject token", ends="from other into turned"),
        one("patch resid_post layer 1 at subject token", ends="from other, turned into longer"),
    ],
    "sites": [
        PATCH,
        one("patch resid_post layer 0 at subject token"),
        one("patch resid_mid layer 1 at subject token"),
        one("patch z layer 1 head 1 at subject token"),
        one("patch z layer 1 head 2 at subject token"),
        one("patch z layer 1 heads 1, 2 at subject token"),
        one("patch z layer 1 at subject token"),
        one("patch mlp_hidden layer 1 neurons 1..4 at subject token"),
    ],
    "runs with rules": [
            one("patch z layer 2 head 1 at last token", f"run r {{ {rules} }}", *more, ends=ends)
            for rules, ends, *more in (
                ("from other into clean patch mlp_out layer 1 at cue token", "from r into clean"),
                ("from other into clean patch mlp_out layer 0 at cue token", "from r into clean"),
                ("from other into clean patch mlp_out layer 1 at last token", "from r into clean"),
                ("from turned into clean patch mlp_out layer 1 at cue token", "from r into clean"),
                ("from clean into other patch mlp_out layer 1 at cue token", "from r into clean"),
                ("from other into clean patch mlp_out layer 1 at cue token", "from other into r"),
                ("ablate mlp_out layer 1 at cue token with zero", "from r into clean"),
                ("ablate mlp_out layer 1 at cue token with mean", "from r into clean"),
                ("ablate mlp_out layer 1 at cue token with mean of turned", "from r into clean"),
                ("ablate mlp_out layer 1 at cue token with resample", "from r into clean"),
                ("set z layer 1 head 1 at cue token to 0.5", "from r into clean"),
                ("set z layer 1 head 1 at cue token to 0.25", "from r into clean"),
                ("block attention layer 0 from cue token to subject token", "from r into clean"),
                ("block attention layer 0 from cue token to token 1", "from r into clean"),
                (
                    "ablate mlp_out layer 0 at cue token with zero } run s { from r into clean "
                    "patch mlp_out layer 1 at cue token",
                    "from s into clean",
                ),
                (
                    "set z layer 0 head 1 at cue token to 0.5 } run s { from r into clean "
                    "patch mlp_out layer 1 at cue token",
                    "from s into clean",
                ),
            )
    ],
    "compared with runs with rules": [
        one(
            "patch z layer 1 head 1 at last token",
            f"run r {{ ablate mlp_out layer {layer} at cue token with zero }}",
            "measure kl(r) as raw",
        )
        for layer in range(3)
    ],
    "positions": [
        one(rule, ends="from longer into turned")
        for rule in (
            "patch resid_post layer 1 at subject token",
            "patch resid_post layer 1 at last token",
            "patch resid_post layer 1 at subject tokens",
            "patch resid_post layer 1 at first-item token",
            "patch resid_post layer 1 at subject token onto first-item token",
            "patch resid_post layer 1 at first-item token onto subject token",
            "patch resid_post layer 1 at subject token into layer 0",
        )
    ],
    "verbs and fills": [
        ablated("zero"),
        ablated("mean"),
        ablated("resample"),
        ablated("mean of turned"),
        ablated("mean of apart"),
        ablated("mean by cue"),
        one("set z layer 1 head 1 at subject token to 0.5"),
        one("set z layer 1 head 1 at subject token to 2"),
        one("swap resid_post layer 1 at subject token with first-item token"),
        one("patch embed at subject token\n  freeze z layer 1 head 1 at last token"),
        one("patch embed at subject token\n  freeze z layer 2 head 1 at last token"),
    ],
    "attention": [
        one(f"block {ATTENTION} subject token"),
        one(f"block {ATTENTION} first-item token"),
        one(f"reweight {ATTENTION} subject token by 2"),
        one(f"reweight {ATTENTION} subject token by 3"),
        one(f"set {ATTENTION} subject tokens to uniform"),
        one(f"set {ATTENTION} subject token to 0.3"),
        one(f"observe {ATTENTION} subject token", ends="", measures=()),
        one(f"observe {ATTENTION} first-item token", ends="", measures=()),
        *(
            one(f"observe {word} pattern layer 1 head 1 at last token", ends="", measures=())
            for word in ("entropy", "distance", "distance(2)", "distance(3)")
        ),
    ],
    "estimated paths": [
        one("path z layer 0 head 1 -> q layer 2 head 1 at last token"),
        *(
            one(f"path {rule}", "using eap")
            for rule in (
                "z layer 0 head 1 -> q layer 2 head 1 at last token",
                "z layer 0 head 2 -> q layer 2 head 1 at last token",
                "z layer 0 head 2 -> q layer 2 head 2 at last token",
                "z layer 0 head 2 -> v layer 2 head 1 at last token through mlps",
                "z layer 0 head 2 -> v layer 2 head 1 at last token",
                "z layer 0 head 2 -> v layer 2 head 1 at last token with frozen norms",
            )
        ),
        one("path z layer 0 head 1 -> q layer 2 head 1 at last token", "using eap_ig(steps: 2)"),
        one("path z layer 0 head 1 -> q layer 2 head 1 at last token", "using eap_ig(steps: 3)"),
    ],
    "paths": [
        one("path z layer 0 head 1 -> q layer 1 head 1 at last token"),
        one("path z layer 0 head 1 -> k layer 1 head 1 at last token"),
        one("path z layer 0 head 1 -> q layer 2 head 1 at last token"),
        one("path z layer 0 head 1 -> q layer 2 head 1 at last token through mlps"),
        one("path z layer 0 head 1 -> logits at last token"),
        one("path z layer 0 head 1 -> logits at last token through mlps"),
        *(
            f"group ends = {ends}\n" + one("path z layer 0 head 1 -> ends at last token")
            for ends in ("L2H1.q, L2H0.q", "L2H1.q, logits", "L2H1.q, L2H0.q, logits")
        ),
    ],
    "measures": [
        PATCH,
        one("patch resid_post layer 1 at subject token", PROB),
        one("patch resid_post layer 1 at subject token", "measure prob(wrong) as raw"),
        one("patch resid_post layer 1 at subject token", 'measure prob("w3") as raw'),
        one("patch resid_post layer 1 at subject token", 'measure logprob("w3 w9") as raw'),
        one("patch resid_post layer 1 at subject token", 'measure logprob("w9 w3") as raw'),
        one("patch resid_post layer 1 at subject token", f"{PROB[:20]} at subject token as raw"),
        *(
            one("patch resid_post layer 1 at subject token", f"measure {a} {sign} {b} * {c} as raw")
            for a, b, c in [["prob(answer)", "prob(wrong)", f"prob({of})"] for of in TWO_TEXTS]
            for sign in "+-"
        ),
        one("patch resid_post layer 1 at subject token", "measure kl(clean) as raw"),
        one("patch resid_post layer 1 at subject token", "measure kl(other) as raw"),
        one(
            "patch resid_post layer 1 at subject token",
            "measure cosine(L1.resid, other) at subject token as raw",
        ),
        one(
            "patch resid_post layer 1 at subject token",
            "measure cosine(L2.resid, other) at subject token as raw",
        ),
        one("patch resid_post layer 1 at subject token", "measure loss as raw"),
        *(
            one("patch resid_post layer 1 at subject token", f"measure {texts} as raw")
            for texts in (
                'prob("w9 w3")',
                'correct("w9 w3")',
                'prob("w3", "w9 w3")',
                'prob("w3", "w9 w5")',
                'prob("w3", "w9 w5", "w5 w9")',
                'logprob("w3", "w9 w3")',
            )
        ),
    ],
    "estimates": [
        PATCH,
        one("patch resid_post layer 1 at subject token", "using gradient_input"),
        one("patch resid_post layer 1 at subject token", "using integrated_gradients(steps: 2)"),
        one("patch resid_post layer 1 at subject token", "using integrated_gradients(steps: 3)"),
        one(
            "patch resid_post layer 1 at subject token",
            "using gradient",
            DIFFERENCE.replace("delta", "raw"),
        ),
    ],
    "what moves together": [
        one(f"patch resid_post layer 1 at {at}", "using integrated_gradients(steps: 2)")
        for at in ("subject token", "subject token, last token", "subject token, cue token")
    ],
    "which heads move together": [
        one(f"patch z layer 1 head {few} at subject token", "using integrated_gradients(steps: 2)")
        for few in ("0..1", "1..2")
    ],
    "which rows": [
        ablated("mean"),
        ablated("mean", 'keep prob("w3") > prob("w5")'),
        ablated("resample", 'keep prob("w3") > prob("w5")'),
    ],
    "noise": [
        one("patch resid_post layer 1 at subject token", ends="from clean into noised"),
        one("patch resid_post layer 1 at last token", ends="from clean into noised"),
    ],
}  # fmt: skip
APART = """
prompts apart {
  rows "data.jsonl"
  template "w7 {subject} w8 {alt}"
}
"""


def ran(
    text: str, folder: Path, store: Path | None, family: str = "gpt2", prompts: str = NOISED,
    seed: int = 0, options: RunOptions | None = None,
) -> tuple[FileResult, int]:  # fmt: skip
    """A file's result, and the number of rows that ran."""
    done: list[int] = []
    options = options or RunOptions()
    how = RunOptions(
        settings=options.settings,
        without=options.without,
        on_profile=lambda _, profile: done.append(
            profile.distinct + profile.estimated + profile.unpatched_passes
        ),
    )

    def run(kept: Any = None) -> FileResult:
        model = support.bare(family, seed)
        found, problems = support.try_file(
            APART + text, folder, model, how, run=kept, prompts=prompts
        )
        assert found is not None, problems
        return found

    if store is None:
        return run(), sum(done)
    with Store(store) as kept, kept.begin(text + prompts + str(options), {}) as opened:
        found = run(opened)
        opened.finish({}, {})
    return found, sum(done)


def check_other_values(texts: Sequence[str], folder: Path, family: str, every: bool) -> None:
    """Check that each file computes other values, and that the last one computes them once.

    Args:
        every: Compare each file with a run without a store, not only the last one.
    """
    store = folder / "store"
    seen: list[np.ndarray] = []
    last: FileResult | None = None
    for number, text in enumerate(texts):
        last, rows = ran(text, folder, store, family)
        assert rows > 0, f"nothing was run for\n{text}"
        if every or number == len(texts) - 1:
            close(ran(text, folder, None, family)[0], last)
        patched = arrays(last)["e 0 patched"]
        assert not any(np.array_equal(patched, other) for other in seen), f"no other\n{text}"
        seen.append(patched)
    assert last is not None
    again, rows = ran(texts[-1], folder, store, family)
    assert rows == 0
    same_bits(last, again)


@pytest.mark.slow  # the next test runs half of the files, and compares the last one of each kind
@pytest.mark.parametrize("kind", DIFFERENT)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_changed_files_are_recomputed(kind: str, family: str, tmp_path: Path) -> None:
    check_other_values(DIFFERENT[kind], tmp_path, family, every=True)


def test_other_values_of_every_kind_are_computed(tmp_path: Path) -> None:
    """Of long lists, every second pair of neighbours, which differ least."""
    for number, every in enumerate(DIFFERENT.values()):
        texts = [text for n, text in enumerate(every) if len(every) <= 6 or n % 4 > 1]
        folder = tmp_path / str(number)
        folder.mkdir()
        check_other_values(texts, folder, "llama", every=False)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_other_position_ids_are_computed(family: str, tmp_path: Path) -> None:
    """Not of every family of the other kinds: BLOOM takes no position ids."""
    rules = ("subject tokens from 5", "subject tokens from 6", "last token from 6")
    texts = [one(f"renumber {rule}", ends="") for rule in rules]
    check_other_values(texts, tmp_path, family, every=True)


SAME = one("patch resid_post layer 0..2 at subject token", DIFFERENCE, PROB)
EQUAL: dict[str, str] = {
    "another name": SAME.replace("experiment e", "experiment f"),
    "another effect": SAME.replace("as raw", "as delta"),
    "fewer layers": SAME.replace("0..2", "1..2"),
    "one layer": SAME.replace("layer 0..2", "layer 1"),
    "another statistic": SAME.replace("bootstrap(100)", "bootstrap(200)"),
    "one measure": SAME.replace(PROB, ""),
    "measures turned round": SAME.replace(DIFFERENCE, "@")
    .replace(PROB, DIFFERENCE)
    .replace("@", PROB),
}


@pytest.mark.parametrize("change", EQUAL)
def test_changes_without_effect_on_numbers_run_nothing(change: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    ran(SAME, tmp_path, store)
    found, rows = ran(EQUAL[change], tmp_path, store)
    assert rows == 0
    close(ran(EQUAL[change], tmp_path, None)[0], found)


def test_added_layer_runs_only_its_cells(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = one("patch resid_post layer 0..1 at last token")
    more = one("patch resid_post layer 0..2 at last token")
    ran(first, tmp_path, store)
    found, rows = ran(more, tmp_path, store)
    close(ran(more, tmp_path, None)[0], found)
    # The new layer's rows, and the unpatched runs that they start from and read.
    assert rows == len(ROWS) + 1


def test_base_run_that_was_a_source_run_gets_its_bounds_of_rounding(tmp_path: Path) -> None:
    """Source runs need no bounds."""
    store = tmp_path / "store"
    ran(
        one("patch resid_post layer 1 at subject token", ends="from clean into other"),
        tmp_path,
        store,
    )
    alone, found = ran(PATCH, tmp_path, None)[0], ran(PATCH, tmp_path, store)[0]
    bounds = [each.experiments[0].measures[0].rounding for each in (alone, found)]
    assert np.asarray(bounds).min() > 0
    np.testing.assert_allclose(*bounds, rtol=0.1)


@pytest.mark.parametrize("using", ["gradient_input", "integrated_gradients(steps: 2)"])
def test_added_layer_estimates_only_its_cells(using: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = one("patch z layer 0..1 head * at last token", f"using {using}")
    more = one("patch z layer 0..2 head * at last token", f"using {using}")
    ran(first, tmp_path, store)
    found, rows = ran(more, tmp_path, store)
    close(ran(more, tmp_path, None)[0], found)
    heads = len(found.experiments[0].cells) // 3
    assert rows == heads * len(ROWS) + 1


def test_added_rows_run_alone(tmp_path: Path) -> None:
    store = tmp_path / "store"
    few = RunOptions(settings=CheckSettings(limit=3))
    ran(PATCH, tmp_path, store, options=few)
    found, rows = ran(PATCH, tmp_path, store)
    close(ran(PATCH, tmp_path, None)[0], found)
    assert rows == 1 + 1  # a row, and the pass over its unpatched runs


def test_mean_and_resample_are_recomputed_for_added_rows(tmp_path: Path) -> None:
    store, text = tmp_path / "store", ablated("mean") + ablated("resample").replace(" e ", " r ")
    ran(text, tmp_path, store, options=RunOptions(settings=CheckSettings(limit=3)))
    found, rows = ran(text, tmp_path, store)
    close(ran(text, tmp_path, None)[0], found)
    assert rows > len(ROWS)


def test_value_key_depends_on_seed_noise_passes_and_row_content(tmp_path: Path) -> None:
    store = tmp_path / "store"
    text = one("patch resid_post layer 1 at subject token", ends="from clean into noised")
    ran(text, tmp_path, store)
    for change in (
        {"seed": 1},
        {"prompts": "seed 5\n" + NOISED},
        {"prompts": NOISED.replace("std: 0.5", "std: 0.7")},
        {"prompts": NOISED.replace("samples: 2", "samples: 3")},
        {"prompts": NOISED.replace("embed at subject tokens", "embed at subject token")},
        {"options": RunOptions(without=frozenset({"prefix"}))},
    ):
        found, rows = ran(text, tmp_path, store, **change)  # type: ignore[arg-type]
        assert rows > 0, change
        close(ran(text, tmp_path, None, **change)[0], found)  # type: ignore[arg-type]
    # The same position in the file, with other content.
    changed = [{**row, "subject": "w45 w3"} if n == 1 else row for n, row in enumerate(ROWS)]
    support.write_rows(tmp_path, changed)
    found, rows = ran(text, tmp_path, store)
    close(ran(text, tmp_path, None)[0], found)
    assert 0 < rows < len(ROWS)
    # Another order, the same content.
    support.write_rows(tmp_path, changed[::-1])
    found, rows = ran(text, tmp_path, store)
    assert rows == 0
    close(ran(text, tmp_path, None)[0], found)


def test_value_key_depends_on_the_code_of_python_functions(tmp_path: Path) -> None:
    store = tmp_path / "store"
    how = RunOptions(settings=CheckSettings(python="run"))
    metric = 'measure python("own.py:read") as raw'
    fill = 'set resid_post layer 1 at subject token to python("own.py:fill")'
    text = one(fill, metric)
    for factor in (1, 2):
        code = (
            f"def read(logits, rows):\n    return logits[:, 5] * {factor}\n"
            f"def fill(vectors):\n    return vectors * {factor + 1}\n"
        )
        (tmp_path / "own.py").write_text(code, encoding="utf-8")
        found, rows = ran(text, tmp_path, store, options=how)
        assert rows > 0
        close(ran(text, tmp_path, None, options=how)[0], found)
        assert ran(text, tmp_path, store, options=how)[1] == 0


def test_value_key_of_a_python_rule_depends_on_all_rows_of_its_cell(tmp_path: Path) -> None:
    """It receives all rows of its cell, in order, and nothing of other cells."""
    store = tmp_path / "store"
    how = RunOptions(settings=CheckSettings(python="run"))
    code = (
        "import torch\ndef fill(vectors):\n"
        "    return (1 + torch.arange(len(vectors)))[:, None, None] * vectors - vectors[:1]\n"
    )
    (tmp_path / "own.py").write_text(code, encoding="utf-8")
    lone = one('set resid_post layer 1 at subject token to python("own.py:fill")')
    assert ran(lone, tmp_path, store, options=how)[1] > 0
    swept = lone.replace("layer 1", "layer 0..1")
    found, rows = ran(swept, tmp_path, store, options=how)
    alone, whole = ran(swept, tmp_path, None, options=how)
    assert 0 < rows <= whole - len(ROWS)
    close(alone, found)
    changed = [*ROWS[:-1], {**ROWS[-1], "cue": "w9"}]
    for data in (ROWS[::-1], ROWS[1:], changed, [*ROWS, ROWS[1]]):
        support.write_rows(tmp_path, data)
        found, rows = ran(swept, tmp_path, store, options=how)
        assert rows >= 2 * len(data)
        close(ran(swept, tmp_path, None, options=how)[0], found)
        again, rows = ran(swept, tmp_path, store, options=how)
        assert rows == 0
        close(again, found)


def test_value_key_depends_on_row_content_not_on_row_id(tmp_path: Path) -> None:
    """Row ids and unread columns aren't part of the key."""
    store = tmp_path / "store"
    ran(PATCH, tmp_path, store)
    support.write_rows(tmp_path, [{**row, "unread": n} for n, row in enumerate(ROWS)])
    assert ran(PATCH, tmp_path, store)[1] == 0
    assert json.loads((tmp_path / "data.jsonl").read_text("utf-8").splitlines()[1])["unread"] == 1


def test_value_key_depends_on_the_model_of_the_source_run(tmp_path: Path) -> None:
    """Rows of another model have other keys, even with equal tokens."""
    support.write_rows(tmp_path)
    lines = ["prompts p", "from tuned into m", "patch resid_post layer 1 at subject token"]
    rules = experiment("e", *lines, DIFFERENCE).replace("  model m\n", "")
    text = f'mech 1\nmodel m = local("a")\nmodel tuned = local("b")\n{PROMPTS}\n{rules}'
    source = Source(text, tmp_path / "file.mech")
    m = support.adopted("llama")
    seen: list[np.ndarray] = []
    for seed in (1, 2):
        models = {"m": m, "tuned": support.shared(support.bare("llama", seed), "tuned")}
        alone, problems = support.run_on(source, models)
        assert alone is not None, problems
        with Store(tmp_path / "store") as store, store.begin(str(seed), {}) as kept:
            found, _ = support.run_on(source, models, run=kept)
            kept.finish({}, {})
        assert found is not None
        close(alone, found)
        seen.append(arrays(found)["e 0 patched"])
    assert not np.allclose(*seen)


ROW = "patch resid_post layer 1 at subject token"
CHANGED: dict[str, tuple[str, dict[str, str]]] = {
    "the text that a metric names": (one(ROW, PROB), {"a": "w3"}),
    "a text of several tokens": (one(ROW, "measure logprob(answer) as raw"), {"a": "w3 w9"}),
    "the run that a metric compares with": (
        one(ROW, "measure kl(other) as raw", ends="from turned into clean"),
        {"alt": "w3 w5"},
    ),
    "the run that is read": (one(ROW), {"alt": "w3 w5"}),
    "what noise is drawn for": (
        one(ROW, 'measure prob("w3") as raw', ends="from clean into noised"),
        {"b": "w3"},
    ),
    "the rows of another run's mean": (ablated("mean of turned"), {"turned": ["w3", "w9"]}),  # type: ignore[dict-item]
    "the group of a mean": (ablated("mean by cue2"), {"cue2": "w21"}),
}


@pytest.mark.parametrize("change", CHANGED)
def test_changed_row_content_is_recomputed(change: str, tmp_path: Path) -> None:
    """The row has the same position in the file, and all other values are equal."""
    store = tmp_path / "store"
    text, other = CHANGED[change]
    ran(text, tmp_path, store)
    support.write_rows(
        tmp_path, [{**row, **other} if n == 2 else row for n, row in enumerate(ROWS)]
    )
    alone, _ = ran(text, tmp_path, None)
    found, rows = ran(text, tmp_path, store)
    assert rows > 0
    close(alone, found)


def test_number_lists_distinguishes_order_length_and_content() -> None:
    lists = [(), (0,), (1,), (0, 0), (1, 2), (2, 1), (3, 0), (0, 3), (0, 1, 2), (1, 2, 0)]
    found = number_lists(RaggedColumn.of([*lists, *lists]))
    assert len(set(found.tolist())) == len(lists)
    assert found[: len(lists)].tolist() == found[len(lists) :].tolist()


def test_mix_numbers_depends_on_the_order() -> None:
    some = np.arange(2000, dtype=np.uint64)
    others = some + np.uint64(5000)
    both = np.concatenate(
        [mix_numbers(some, others), mix_numbers(others, some), mix_numbers(some, some)]
    )
    assert len(np.unique(both)) == len(both)


def test_value_key_depends_on_the_content_of_a_lens_file(tmp_path: Path) -> None:
    """The key of a tuned lens depends on its numbers, not on its file name."""
    store, model = tmp_path / "store", support.bare("gpt2")
    width = model.get_output_embeddings().weight.shape[1]
    line = 'observe tuned_lens("lens.safetensors") resid_post layer 0 at last token'
    text = one(line, ends="", measures=())
    square = torch.zeros(width, width)
    for scale in (0.0, 2.0):
        lens = {"layer.0.weight": square, "layer.0.bias": scale * torch.arange(float(width))}
        save_file(lens, tmp_path / "lens.safetensors")
        alone, _ = ran(text, tmp_path, None)
        found, rows = ran(text, tmp_path, store)
        assert rows > 0
        close(alone, found)
    found, rows = ran(text, tmp_path, store)
    assert rows == 0
    close(alone, found)


NAMED_PROMPTS = """
prompts fruit {
  rows "data.jsonl"
  xs = list(item, from: words, sep: " ")
  template "{xs} w40 {subject} w41 {cue} w42"
  answer " {a}"
  wrong " {b}"
  accepted = list(" {entry}", from: words)
  corrupt fewer { subject = alt }
  corrupt longer { words = more  cue = cue2 }
}
"""
BODIES = [
    """from fewer into clean
      patch resid_post layer 1 at subject token
      measure gap as delta
      measure kl(fewer) as raw
      measure prob(accepted) as raw""",
    """from fewer into longer
      patch pair at cue token
      measure cosine(L1.resid, longer) at subject token as raw""",
    """from clean into fewer
      ablate z layer 1 head 1 at subject token with
        mean, mean of longer, mean of apart, mean by cue
      measure gap as delta""",
    """run healed { ablate mlp_out layer 1 at cue token with zero }
      from healed into clean
      patch z layer 2 head 1 at last token
      measure kl(healed) as raw""",
    """for deep in 0..1 {
        set z layer deep head 1 at last token to scale_of_it
        measure cosine(resid_post layer deep, clean) at last token as raw
      }""",
    """from fewer into clean
      add 2 * along to resid_post layer 1 at subject token
      measure gap as delta""",
    """from fewer into clean
      for deep in 0..1 { patch resid_post layer deep at subject token }
      measure gap as delta
      using integrated_gradients(steps: 2)""",
    "observe similarity resid_post layer 1 of fewer with longer at subject token",
    """from clean into fewer
      ablate z layer 1 head 1 at subject token with resample, resample of longer
      measure gap as delta""",
    """from fewer into clean
      generate 2 with temperature 3
      for deep in 0..1 { patch resid_post layer deep at subject token }
      measure length as raw""",
]
NAMED = (
    "param scale_of_it = 0.5\ngroup pair = L0H1, L1H2\n"
    "metric gap = logit(answer) - logit(wrong)\n"
    "direction along = mean_difference(apart, fruit) at resid_post layer 1 at last token\n"
    + "".join(experiment(f"e{n}", "prompts fruit", body) for n, body in enumerate(BODIES))
)


def run_named(folder: Path, name: str = "", to: str = "", *, text: str = NAMED) -> tuple[str, int]:
    """The tables of a file with one name replaced, and the number of rows that ran."""

    def renamed(part: str) -> str:
        return re.sub(rf"\b{name}\b", to, part) if name else part

    others = renamed(APART) + renamed("seed 3" + NAMED_PROMPTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "APART", "")
        found, rows = ran(renamed(text), folder, folder / "store", prompts=others)
    return "".join(each.to_text(10_000) for each in found.experiments), rows


def words(text: str) -> list[str]:
    """Words without lines, columns (whose widths depend on names) and row order."""
    return sorted(re.findall(r"[^\s─━,]+", text))


ORDERED = len(BODIES) - 3
"""Experiments from this one on depend on the row order, which the block's name seeds, or sample by
the values of a row and their names."""
OF_ANY_ORDER = NAMED[: NAMED.index(f"experiment e{ORDERED} ")]


@pytest.fixture(scope="module")
def kept_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of `NAMED`."""
    folder = tmp_path_factory.mktemp("names")
    assert run_named(folder)[1] > 0
    return folder


@cache
def unchanged(folder: Path, text: str) -> tuple[str, int]:
    """(tables, the rows that run again: directions are fitted, and replies are read)."""
    return run_named(folder, text=text)


OF_ROWS = ["fruit", "accepted", "xs"]
NAMES = [*OF_ROWS, "entry", "apart", "fewer", "longer", "healed", "pair", "gap", "along", "deep"]
NAMES += ["scale_of_it", *(f"e{n}" for n in range(len(BODIES)))]


@pytest.mark.parametrize("name", some(NAMES, NAMES[::8]))
def test_renaming_runs_nothing_and_tables_have_the_new_name(name: str, kept_names: Path) -> None:
    text = OF_ANY_ORDER if name in OF_ROWS else NAMED
    tables, again = unchanged(kept_names, text)
    found, rows = run_named(kept_names, name, "renamed", text=text)
    assert rows == again
    assert words(found) == words(re.sub(rf"\b{name}\b", "renamed", tables))
