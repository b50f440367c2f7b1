"""Values from the store: bit-identical in resumed runs, and only missing values are computed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechdsl.checks.file_check import CheckSettings
from mechdsl.execute.run_record import ExecutionOptions, ExecutionProfile
from mechdsl.pipeline.options import RunOptions
from mechdsl.results.experiment_result import FileResult
from mechdsl.store.runs import OpenRun
from mechdsl.store.store import Store

from ..quick import some
from . import support
from .drawn import Case, few, many
from .test_random_files import cases, experiments

SMALL = ExecutionOptions(pass_tokens=60, prompt_tokens=60)
"""Several passes and several batches of prompts."""


class Stopped(Exception):
    """Simulates anything that ends a run."""


@contextmanager
def opened(folder: Path, key: str = "k", **how: Any) -> Iterator[OpenRun]:
    with Store(folder / "store") as store, store.begin(key, {}, **how) as run:
        yield run


def run(
    text: str,
    folder: Path,
    family: str = "gpt2",
    *,
    kept: OpenRun | None = None,
    limit: int | None = None,
    options: ExecutionOptions = SMALL,
    prompts: str = support.PROMPTS,
    **more: Any,
) -> tuple[FileResult | None, ExecutionProfile]:
    """The result of a file, and the profile of its run."""
    done: list[ExecutionProfile] = []
    how = RunOptions(
        settings=CheckSettings(limit=limit),
        execution=options,
        on_profile=lambda _, profile: done.append(profile),
        **more,
    )
    model = support.bare(family)
    found, _ = support.try_file(text, folder, model, how, run=kept, prompts=prompts)
    whole = ExecutionProfile()
    for each in done:
        whole.passes += each.passes
        whole.unpatched_passes += each.unpatched_passes
        whole.known += each.known + each.resumed
        whole.distinct += each.distinct
    return found, whole


def arrays(result: FileResult) -> dict[str, np.ndarray]:
    """All values of prompts in a result."""
    found: dict[str, np.ndarray] = {}
    for each in result.experiments:
        for number, data in enumerate(each.measures):
            name = f"{each.name} {number}"
            found |= {f"{name} patched": data.patched, f"{name} base": data.base}
            if data.rounding is not None:  # unknown for estimates
                found[f"{name} rounding"] = data.rounding
            if data.source is not None:
                found[f"{name} source"] = data.source
        for kind, values in (("accuracy", each.accuracy), ("bound", each.accuracy_rounding)):
            found |= {f"{each.name} {kind} {name}": rows for name, rows in values.items()}
        if each.drawn is not None:
            found |= {f"{each.name} drawn {n}": v for n, v in enumerate(each.drawn.values)}
        found[f"{each.name} rows"] = np.array(each.row_keys)
    return found


def same_bits(one: FileResult | None, other: FileResult | None) -> None:
    assert one is not None
    assert other is not None
    expected, found = arrays(one), arrays(other)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert values.tobytes() == found[name].tobytes(), name
    for a, b in zip(one.experiments, other.experiments, strict=True):
        assert a.cells == b.cells
        assert a.left_out == b.left_out
        assert a.conventions == b.conventions
        assert [data.gaps for data in a.measures] == [data.gaps for data in b.measures]


def close(one: FileResult | None, other: FileResult | None) -> None:
    assert one is not None
    assert other is not None
    expected, found = arrays(one), arrays(other)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(values, found[name], rtol=1e-4, atol=1e-4, err_msg=name)


def stops_after(monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    """End a run after it has stored this many blocks."""
    whole, count = OpenRun.keep, [0]

    def keep(self: OpenRun, block: Any) -> None:
        if count[0] == passes:
            raise Stopped
        whole(self, block)
        count[0] += 1

    monkeypatch.setattr(OpenRun, "keep", keep)


def check_case(family: str, text: str, folder: Path, cut: int) -> None:
    """Run a file without a store, with an empty one, again, on fewer rows first, interrupted."""
    plain, alone = run(text, folder, family)
    if plain is None:
        return
    with opened(folder / "a") as kept:
        first, once = run(text, folder, family, kept=kept)
    same_bits(plain, first)
    assert (once.passes, once.unpatched_passes) == (alone.passes, alone.unpatched_passes)
    again_profile = ExecutionProfile()
    with opened(folder / "a", "other") as kept:
        again, again_profile = run(text, folder, family, kept=kept)
    same_bits(plain, again)
    gaps = any(cell for e in plain.experiments for m in e.measures for cell in m.gaps)
    if not gaps and not re.search(r"_lens .* top", text):  # lists are of all rows
        assert again_profile.passes == 0
        assert again_profile.unpatched_passes == 0 or reads_all_rows(text)
    with opened(folder / "b", "few") as kept:
        run(text, folder, family, kept=kept, limit=4)
    with opened(folder / "b", "all") as kept:
        close(plain, run(text, folder, family, kept=kept)[0])
    check_cut(family, text, folder, cut, plain, once.passes)


def reads_all_rows(text: str) -> bool:
    """Whether rules use a direction: fits aren't stored, and tables report the norm."""
    used = "\n".join(line for line in text.splitlines() if not line.startswith("direction "))
    return re.search(r"\b(d|by_layer)\b", used) is not None


def check_cut(
    family: str, text: str, folder: Path, cut: int, plain: FileResult, passes: int
) -> None:
    """Interrupt a run twice after some blocks, and resume it."""
    kept_before = 0
    for stop in (cut, 2):
        with pytest.MonkeyPatch.context() as patch, opened(folder / "c") as kept:
            stops_after(patch, stop)
            try:
                found, done = run(text, folder, family, kept=kept)
            except Stopped:
                kept_before += stop
                continue
        same_bits(plain, found)
        return
    with opened(folder / "c") as kept:
        assert kept.resumed
        found, done = run(text, folder, family, kept=kept)
    same_bits(plain, found)
    assert done.passes <= passes


def random_files(case: Case, tmp_path_factory: Any) -> None:
    family, text, _ = case
    check_case(family, text, tmp_path_factory.mktemp("case"), cut=len(text) % 7)


test_random_files = few(cases(), 6)(random_files)
test_many_random_files = many(cases(), 60)(random_files)


TWICE = f"""experiment e {{
  model m
  prompts p
  from other into clean
  patch resid_post layer 0..2 at subject token
  {support.DIFFERENCE}
  measure kl(clean) as raw
  {support.STATS}
}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
@pytest.mark.parametrize("experiments", some([1, 2], [1]))
def test_resumed_rows_with_equal_content_keep_their_bits(
    family: str, experiments: int, tmp_path: Path
) -> None:
    """Their last bits depend on the other rows of the pass; each row keeps its value."""
    kept_ones = TWICE.replace("experiment e", "experiment f").replace(
        "  from", "  keep prob(answer) > 0\n  from"
    )
    text = TWICE + kept_ones * (experiments - 1)
    rows = [support.ROWS[number] for number in (0, 1, 2, 3, 2, 0, 1, 1, 3, 0, 2)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    how = ExecutionOptions(pass_tokens=180, prompt_tokens=60)
    plain, alone = run(text, tmp_path, family, options=how)
    left: list[int] = []
    stop = 0
    while True:
        folder = tmp_path / str(stop)
        with pytest.MonkeyPatch.context() as patch, opened(folder) as kept:
            stops_after(patch, stop)
            try:
                found, _ = run(text, tmp_path, family, kept=kept, options=how)
                break
            except Stopped:
                pass
        with opened(folder) as kept:
            assert kept.resumed
            found, done = run(text, tmp_path, family, kept=kept, options=how)
        same_bits(plain, found)
        left.append(done.passes)
        stop += 1
    same_bits(plain, found)
    assert [passes for passes in left if passes < alone.passes] == [*range(1, alone.passes)][::-1]


def looking(name: str, line: str, seed: int = 0) -> str:
    return f"seed {seed}\nexperiment {name} {{\n model m\n prompts p\n {line}\n}}\n"


TOGETHER = {
    "observe similarity resid_post layer * at cue token with last token": [
        "observe similarity resid_post layer * at cue token with subject token",
        "observe similarity resid_post layer * of other at cue token with last token",
        "observe similarity resid_post layer * with other at cue token",
        "observe similarity resid_pre layer * at cue token with last token",
    ],
    "observe similarity resid_post layer * with other at cue token": [
        "observe similarity resid_post layer * with turned at cue token",
        "observe similarity resid_post layer * of turned with other at cue token",
    ],
    "observe cka resid_post layer * with other at last token": [
        "observe cka resid_post layer * with turned at last token",
        "observe cka resid_post layer * of turned with other at last token",
    ],
    "observe cka resid_post layer * with attn_out layer 1 at last token": [
        "observe cka resid_post layer * with attn_out layer 2 at last token",
        "observe cka resid_post layer * with attn_out layer 1 at cue token",
    ],
    "observe probe(a, folds: 2) at resid_post layer * at last token": [
        "observe probe(a, folds: 3) at resid_post layer * at last token",
        "observe probe(b, folds: 2) at resid_post layer * at last token",
        "observe probe(a, folds: 2) at resid_post layer * of other at last token",
    ],
    "observe clusters(3) resid_post layer * at cue token": [
        "observe clusters(2) resid_post layer * at cue token",
        "observe clusters(3) resid_post layer * at cue token, last token",
        "observe clusters(3) resid_post layer * with other at cue token",
    ],
    "observe singular_values(ov) at layer * head 1 top 3": [
        "observe singular_values(qk) at layer * head 1 top 3",
    ],
    "observe value_vectors layer 1 neuron 0..3 toward answer": [
        "observe value_vectors layer 1 neuron 0..3 toward wrong",
    ],
}


@pytest.mark.parametrize("line", TOGETHER)
def test_observations_over_all_rows_are_stored_by_their_key(line: str, tmp_path: Path) -> None:
    """Other sites, positions, runs, targets and seeds have other keys."""
    rows = [
        {**row, "cue": cue, "a": f"w{10 + number % 2}", "b": f"w{12 + (number + row_number) % 2}"}
        for row_number, row in enumerate(support.ROWS)
        for number, cue in enumerate(("w20", "w21", "w22", "w23"))
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with opened(tmp_path, "one") as kept:
        first, _ = run(looking("one", line), tmp_path, kept=kept)
    with opened(tmp_path, "two") as kept:
        again, done = run(looking("two", line), tmp_path, kept=kept)
    assert first is not None
    assert again is not None
    for a, b in zip(first.experiments[0].measures, again.experiments[0].measures, strict=True):
        assert a.patched.tobytes() == b.patched.tobytes()
    told = [each.experiments[0].conventions for each in (first, again)]
    assert told[0] == told[1]
    assert ("k-means" in told[0]) == ("clusters" in line)
    cells = len(first.experiments[0].cells)
    assert done.passes == done.unpatched_passes == 0
    assert done.known == cells * len(rows)
    others = [looking("e", other) for other in TOGETHER[line]]
    others += [looking("e", line, seed=3)] if "probe" in line else []
    for number, other in enumerate(others):
        plain, _ = run(other, tmp_path)
        with opened(tmp_path, f"other {number}") as kept:
            found, _ = run(other, tmp_path, kept=kept)
        close(plain, found)
        assert plain is not None
        values = [each.experiments[0].measures[0].patched for each in (plain, first)]
        assert values[0].shape != values[1].shape or not np.allclose(*values, equal_nan=True)


OTHER_RUNS = {
    "with other at cue token": "with turned at cue token",
    "of other at cue token with last token": "of turned at cue token with last token",
    "with turned at cue token": "of other with turned at cue token",
}


@pytest.mark.parametrize("read", OTHER_RUNS)
def test_similarity_of_another_run_is_computed_again(read: str, tmp_path: Path) -> None:
    first, second = (
        looking("e", f"observe similarity resid_post layer 1 {words}")
        for words in (read, OTHER_RUNS[read])
    )
    alone, _ = run(second, tmp_path)
    with opened(tmp_path, "one") as kept:
        before, _ = run(first, tmp_path, kept=kept)
    with opened(tmp_path, "two") as kept:
        after, done = run(second, tmp_path, kept=kept)
    close(alone, after)
    assert done.known == 0
    assert before is not None
    assert after is not None
    assert not np.allclose(arrays(before)["e 0 patched"], arrays(after)["e 0 patched"])


TRAINING = support.PROMPTS.replace("prompts p", "prompts q").replace("data.jsonl", "more.jsonl")


@pytest.mark.parametrize("change", ["a target", "a token", "the run"])
def test_probe_with_other_training_rows_is_fitted_again(change: str, tmp_path: Path) -> None:
    def rows(name: str, first: int, **of_row: str) -> None:
        made = [
            {**row, "cue": f"w{first + n}", "a": f"w{10 + (n + m) % 2}"}
            for m, row in enumerate(support.ROWS)
            for n in range(4)
        ]
        made[1] |= of_row
        (tmp_path / name).write_text("\n".join(map(json.dumps, made)), encoding="utf-8")

    text = looking("e", "observe probe(a, train: q) at resid_post layer * at last token")
    rows("data.jsonl", 20)
    rows("more.jsonl", 30)
    prompts = support.PROMPTS + TRAINING
    with opened(tmp_path, "first") as kept:
        run(text, tmp_path, kept=kept, prompts=prompts)
    match change:
        case "a target":
            rows("more.jsonl", 30, a="w10")
        case "a token":
            rows("more.jsonl", 30, subject="w7")
        case _:
            text = text.replace("train: q", "train: q.turned")
    alone, _ = run(text, tmp_path, prompts=prompts)
    with opened(tmp_path, "second") as kept:
        found, done = run(text, tmp_path, kept=kept, prompts=prompts)
    assert done.known == 0
    close(alone, found)


_SHARED: dict[str, Path] = {}


def check_shared(family: str, text: str, folder: Path, store: Path) -> None:
    """Check that a file gets correct numbers from a store with values of other files."""
    plain, _ = run(text, folder, family)
    if plain is None:
        return
    with Store(store) as opened_store, opened_store.begin(text, {}) as kept:
        found, _ = run(text, folder, family, kept=kept)
        kept.finish({}, {})
    close(plain, found)


@few(cases(), 6)
def test_many_files_share_a_store(case: Case, tmp_path_factory: Any) -> None:
    family, text, _ = case
    store = _SHARED.setdefault(family, tmp_path_factory.mktemp("store"))
    check_shared(family, text, tmp_path_factory.mktemp("case"), store)


@many(experiments(), 400)
def test_very_many_files_share_a_store(case: str, tmp_path_factory: Any) -> None:
    store = _SHARED.setdefault("slow", tmp_path_factory.mktemp("store"))
    check_shared("gpt2", case, tmp_path_factory.mktemp("case"), store)
