"""Replies in the store: a cached reply isn't generated again, for any measure."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mechdsl.execute import unpatched_runs as writer
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.execute.unpatched_runs import ReplyCache
from mechdsl.pipeline.options import RunOptions
from mechdsl.results.experiment_result import FileResult

from ..shared_models import unchanged
from . import support
from .test_stored_values import Stopped, opened, run, same_bits, stops_after

TEXT = """seed 1
experiment e {
  model m
  prompts p
  from other into clean
  generate 4 %s
  patch resid_post layer * at last token
  ablate mlp_out layer 1 at last token with mean during step 2..3
  measure %s as raw
}
"""
DRAWN = "with temperature 1.5, samples 2"


def text(how: str = "", measure: str = "length") -> str:
    return TEXT % (how, measure)


@pytest.fixture
def rows_written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of replies generated in each pass."""
    whole, counts = writer.generate_replies, list[int]()

    def write(model: Any, request: Any, *given: Any, **named: Any) -> Any:
        counts.append(len(request.prompts))
        return whole(model, request, *given, **named)

    monkeypatch.setattr(writer, "generate_replies", write)
    return counts


def replies(found: FileResult | None) -> Any:
    assert found is not None
    return [each.replies for each in found.experiments]


CUT = 'until "2"'
"""A stop text within a token: the store keeps more of a reply than its text."""


@pytest.mark.parametrize("how", [CUT, DRAWN])
def test_stored_reply_is_generated_once(tmp_path: Path, rows_written: list[int], how: str) -> None:
    support.write_rows(tmp_path)
    plain, _ = run(text(how), tmp_path)
    alone = sum(rows_written)
    assert alone
    with opened(tmp_path / "a") as kept:
        first, _ = run(text(how), tmp_path, kept=kept)
    assert sum(rows_written) == 2 * alone
    with opened(tmp_path / "a", "other") as kept:
        again, _ = run(text(how), tmp_path, kept=kept)
        other, _ = run(text(how, 'contains("w2")'), tmp_path, kept=kept)
    assert sum(rows_written) == 2 * alone
    same_bits(plain, first)
    same_bits(plain, again)
    assert replies(plain) == replies(first) == replies(again) == replies(other)
    tokenizer = support.adopted("gpt2").tokenizer
    assert tokenizer is not None
    every = [reply for own in replies(plain)[0].cells[0].values() for reply in own]
    cut = [reply for reply in every if reply.text != tokenizer.decode(reply.ids)]
    assert bool(cut) is (how == CUT)


def test_reply_key_depends_on_generation_options(tmp_path: Path, rows_written: list[int]) -> None:
    support.write_rows(tmp_path)
    with opened(tmp_path / "a") as kept:
        run(text(), tmp_path, kept=kept)
        once = sum(rows_written)
        for n, how in enumerate(['until "w1"', "with temperature 2", "with temperature 1"]):
            run(text(how), tmp_path, kept=kept)
            assert sum(rows_written) == (n + 2) * once


def test_reply_key_depends_on_the_end_token(
    tmp_path: Path, rows_written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generation config names another end token."""
    support.write_rows(tmp_path)
    with opened(tmp_path / "a") as kept:
        whole, _ = run(text(), tmp_path, kept=kept)
        once = sum(rows_written)
        first = replies(whole)[0].runs["clean"]
        end = first[0][0].ids[1]
        monkeypatch.setattr(support.bare("gpt2").generation_config, "eos_token_id", end)
        other, _ = run(text(), tmp_path, kept=kept)
    assert sum(rows_written) == 2 * once
    for row, (reply,) in replies(other)[0].runs["clean"].items():
        ids = first[row][0].ids
        assert reply.ids == (ids[: ids.index(end)] if end in ids else ids)


def test_rows_with_equal_prompts_are_sampled_independently(tmp_path: Path) -> None:
    support.write_rows(tmp_path, [support.ROWS[0], {**support.ROWS[0], "a": "w12"}])
    file = text("with temperature 3")
    plain, _ = run(file, tmp_path)
    with opened(tmp_path / "a") as kept:
        first, _ = run(file, tmp_path, kept=kept)
        again, _ = run(file, tmp_path, kept=kept)
    assert replies(plain) == replies(first) == replies(again)
    (found,) = replies(plain)
    for own in (found.runs["clean"], *found.cells):
        one, other = own.values()
        assert one != other


def test_missing_samples_are_generated_again(
    tmp_path: Path, rows_written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache lacks different samples of different cells, on one prompt."""
    support.write_rows(tmp_path, support.ROWS[:1])
    find = ReplyCache.find

    def some(self: ReplyCache, *given: Any) -> dict[int, Any]:
        return {n: reply for n, reply in find(self, *given).items() if (n + n // 2) % 2}

    rule = "set resid_post layer * at last token to 2"
    file = text(DRAWN).replace("patch resid_post layer * at last token", rule)
    with opened(tmp_path / "a") as kept:
        first, _ = run(file, tmp_path, kept=kept)
        rows_written.clear()
        monkeypatch.setattr(ReplyCache, "find", some)
        again, _ = run(file, tmp_path, kept=kept)
    assert max(rows_written) > 1
    assert replies(first) == replies(again)


def test_key_of_sampled_replies_depends_on_the_seed(
    tmp_path: Path, rows_written: list[int]
) -> None:
    support.write_rows(tmp_path)
    with opened(tmp_path / "a") as kept:
        run(text(DRAWN), tmp_path, kept=kept)
        once = sum(rows_written)
        run(text(DRAWN).replace("seed 1", "seed 2"), tmp_path, kept=kept)
    assert sum(rows_written) == 2 * once


def test_renamed_loop_variable_uses_stored_replies(tmp_path: Path, rows_written: list[int]) -> None:
    support.write_rows(tmp_path)

    def named(name: str) -> str:
        rule = f"for {name} in 1..1 {{ ablate z layer {name} at last token with zero }}"
        body = f" model m\n prompts p\n generate 4 with temperature 3\n {rule}\n"
        return f"seed 1\nexperiment e {{\n{body} measure length as raw\n}}\n"

    with opened(tmp_path / "a") as kept:
        first, _ = run(named("i"), tmp_path, kept=kept)
        once = sum(rows_written)
        again, _ = run(named("j"), tmp_path, kept=kept)
    assert replies(first) == replies(again)
    assert sum(rows_written) == once


NOISED = """prompts q {
  rows "data.jsonl"
  template "w3 {subject} w41 {cue} w42"
  corrupt noised { add gaussian(std: 2, samples: 2) to embed at subject tokens }
}
experiment e {
  model m
  prompts q
  from clean into noised
  generate 4
  scale mlp_out layer 1 at last token by 3
  measure length as raw
}
"""


def test_replies_of_each_noise_draw_are_stored(tmp_path: Path, rows_written: list[int]) -> None:
    support.write_rows(tmp_path)
    plain, _ = run(NOISED, tmp_path)
    alone = sum(rows_written)
    with opened(tmp_path / "a") as kept:
        first, _ = run(NOISED, tmp_path, kept=kept)
        again, _ = run(NOISED, tmp_path, kept=kept)
    assert sum(rows_written) == 2 * alone
    assert replies(plain) == replies(first) == replies(again)
    (found,) = replies(plain)
    for own in (found.runs["noised"], *found.cells):
        assert any(one != other for one, other in own.values())


def test_interrupted_generation_resumes(
    tmp_path: Path, rows_written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    support.write_rows(tmp_path)
    plain, _ = run(text(), tmp_path)
    alone = sum(rows_written)
    rows_written.clear()
    with monkeypatch.context() as patched:
        stops_after(patched, 2)
        with pytest.raises(Stopped), opened(tmp_path / "a") as kept:
            run(text(), tmp_path, kept=kept)
    done = sum(rows_written)
    with opened(tmp_path / "a") as kept:
        assert kept.resumed
        found, _ = run(text(), tmp_path, kept=kept)
    assert alone <= sum(rows_written) < done + alone
    same_bits(plain, found)
    assert replies(plain) == replies(found)


def test_rows_with_nan_during_generation_are_an_error_or_left_out(tmp_path: Path) -> None:
    """The embedding of a generated token is NaN, so that rows that generate it can't be used."""
    support.write_rows(tmp_path)
    line = "experiment e {\n model m\n prompts p\n generate 4\n measure length as raw\n}\n"
    whole, _ = support.try_file(line, tmp_path, support.bare("llama"))
    (each,) = replies(whole)
    ids = {row: own[0].ids for row, own in each.runs["clean"].items()}
    prompts = {token for text in each.prompts.values() for token in support.ids_of(text.split())}
    bad = next(t for own in ids.values() for t in own[:3] if t not in prompts)
    model = unchanged(copy.deepcopy(support.bare("llama")))
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = torch.nan
    with opened(tmp_path / "a") as kept:
        found, said = support.try_file(line, tmp_path, model, run=kept)
    assert found is None
    assert [d.code for d in said if d.severity == "error"] == ["E0621"]
    assert "during generation" in str(said[-1])
    left = [row for row, own in ids.items() if bad not in own[:3]]
    if left:
        how = RunOptions(execution=ExecutionOptions(allow_nan=True))
        found, _ = support.try_file(line, tmp_path, model, how)
        assert found is not None
        assert [*found.experiments[0].replies.runs["clean"]] == left


def test_sampled_replies_do_not_depend_on_observations(tmp_path: Path) -> None:
    support.write_rows(tmp_path)
    body = (
        " model m\n prompts p\n from other into clean\n generate 3 with temperature 3\n"
        " patch resid_post layer * at last token\n measure length as raw\n"
    )
    look = " observe norm mlp_out layer 2 at each reply token as seen\n"
    file = f"seed 1\nexperiment a {{\n{body}}}\nexperiment b {{\n{body}{look}}}\n"
    found, said = support.try_file(file, tmp_path, support.bare("gpt2"))
    assert found is not None, said
    of: dict[str, dict[object, set[object]]] = {}
    for each in found.experiments:
        own = of.setdefault(each.name, {})
        for cell, texts in zip(each.cells, each.replies.cells, strict=True):
            for row, drawn in texts.items():
                own.setdefault((cell.coords["layer"], row), set()).add(drawn[0].ids)
    assert set(of) == {"a", "b", "b.seen"}
    assert len({ids for own in of["a"].values() for ids in own}) > len(of["a"]) / 2
    assert of["a"] == of["b"] == of["b.seen"]
