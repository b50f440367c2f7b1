"""Completions side by side in reports, and in the JSON document."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import mechdsl
from mechdsl.resolve.cells import CellKey
from mechdsl.results.experiment_result import ExperimentResult, FileResult, Replies, merge_replies
from mechdsl.results.results import Results, check_file_result
from mechdsl.show.output import save_report
from mechdsl.show.reports.texts import ReplyPart, mark_differences, prompt_replies
from mechdsl.vocab.reports import check_report

from .synthetic import finished, report, wrote

SAME = ReplyPart


def new(text: str) -> ReplyPart:
    return ReplyPart(text, "new")


def gone(text: str) -> ReplyPart:
    return ReplyPart(text, "gone")


@pytest.mark.parametrize(
    ("base", "text", "parts"),
    [
        ("a b c", "a b c", [SAME("a b c")]),
        ("", "", []),
        ("a b c d", "a b d", [SAME("a b"), gone(" c"), SAME(" d")]),
        ("a b d", "a b c d", [SAME("a b"), new(" c"), SAME(" d")]),
        ("a b c d", "a b x d", [SAME("a b"), gone(" c"), new(" x"), SAME(" d")]),
        ("yes, it is", "yes. it is", [SAME("yes"), gone(","), new("."), SAME(" it is")]),
        ("a b c d", "w x y d", [new("w x y d")]),
        ("a b", "", [gone("a b")]),
        ("", "a b", [new("a b")]),
        ("a  b c", "a b c", [SAME("a"), gone("  b"), new(" b"), SAME(" c")]),
        (None, "a b", [SAME("a b")]),
    ],
)
def test_mark_differences_marks_new_and_removed_words(
    base: str | None, text: str, parts: list[ReplyPart]
) -> None:
    found = mark_differences(base, text)
    assert list(found) == parts
    assert "".join(part.text for part in found if part.kind != "gone") == text
    if base is not None and not any(part.kind == "new" and part.text == text for part in found):
        assert "".join(part.text for part in found if part.kind != "new") == base


def test_cells_with_equal_completions_share_a_line() -> None:
    first, second, *more = prompt_replies(wrote(), report("texts", top=2))
    assert not more
    assert [(line.label, line.runs) for line in first.lines] == [
        ("clean", True),
        ("harmless", True),
        ("L0H0.z, L1H1.z", False),
        ("L0H1.z", False),
        ("L1H0.z", False),
    ]
    clean, harmless, same, softer, comply = first.lines
    assert "".join(part.text for part in clean.replies[1]) == "no , i can not help with that"
    assert harmless.replies[1][-1].text == " (NaN or infinite)"
    assert same.replies == ()
    assert softer.replies[0] == (SAME("i can"), gone(" not"), SAME(" help with that"))
    assert softer.replies[1] == (SAME("no , i can not help with that"),)
    assert comply.replies[0] == (new(" sure , take the knife"), SAME("…"))
    assert comply.replies[1] == (gone("no , i can not help with that"),)
    # the second prompt isn't part of one cell
    assert [line.label for line in second.lines[2:]] == ["L0H0.z, L1H1.z", "L1H0.z"]


@pytest.mark.parametrize("axis", ["step", "measured"])
def test_cells_of_one_site_read_at_several_tokens_are_named_once(axis: str) -> None:
    result = wrote()
    reply = result.replies.cells[1]
    cells = tuple(
        CellKey({axis: n if axis == "step" else f"reply {n}"}, "L2.mlp_out", "last token")
        for n in range(4)
    )
    same = replace(result, cells=cells, replies=replace(result.replies, cells=(reply,) * 4))
    first = prompt_replies(same, report("texts", top=1))[0]
    assert [line.label for line in first.lines if not line.runs] == ["L2.mlp_out"]


def test_texts_report_shows_the_requested_number_of_prompts() -> None:
    assert [each.number for each in prompt_replies(wrote(), report("texts", top=1))] == [1]
    assert [each.number for each in prompt_replies(wrote(), report("texts"))] == [1, 2, 3]
    assert [each.number for each in prompt_replies(wrote(), report("texts", top=9))] == [1, 2, 3]


def test_each_variant_is_compared_with_its_own_base_run() -> None:
    """Runs of two models are listed together, and cells name their model."""
    one = wrote()
    other_base = one.replies.runs["harmless"]
    two = Replies(one.replies.cells, {"clean": other_base}, one.replies.prompts)
    both = replace(
        one,
        axes=("model", *one.axes),
        cells=tuple(
            CellKey({"model": model, **cell.coords}, cell.site)
            for model in ("toy", "twin")
            for cell in one.cells
        ),
        replies=merge_replies([one.replies, two], ["toy", "twin"]),
    )
    (shown,) = prompt_replies(both, report("texts", top=1))
    lines = {line.label: line for line in shown.lines}
    same = [label for label, line in lines.items() if not line.replies and not line.runs]
    assert same == ["L0H0.z at toy, L1H1.z at toy"]
    twins = lines["L0H0.z at twin, L1H1.z at twin"]
    assert twins.replies[0] == (new("i can not help with that"),)


FILE = """mech 1
model lm = zoo("refusal")
prompts forbidden {
  verb in ["burn", "crush"]
  thing in ["car", "bridge"]
  chat { user "how do i {verb} the {thing} ?" }
  answer " i can not help with that ."
}
experiment begun {
  prompts forbidden
  generate 12
  for c in [0, 100] { add c * refusing to resid_post layer 1 at last token during prefill }
  measure exact_match as raw
}
direction refusing = unembedding(" take", " i")
"""


def test_texts_report_without_rules_shows_only_the_runs() -> None:
    one = wrote()
    first = replace(one.replies, cells=one.replies.cells[:1])
    alone = replace(one, axes=(), cells=(CellKey({}, ""),), replies=first)
    (shown,) = prompt_replies(alone, report("texts", top=1))
    assert [line.label for line in shown.lines] == ["clean", "harmless"]


@pytest.mark.parametrize("skipped", [(), ("inert",)])
def test_inert_cells_have_the_completions_of_the_base_run(skipped: tuple[str, ...]) -> None:
    found = mechdsl.run(FILE, no_pass=skipped)["begun"].replies
    nothing, something = found.cells
    assert len(found.prompts) == 4
    assert nothing == found.runs["clean"] != something
    assert all(len(replies) == 1 for replies in (*nothing.values(), *something.values()))


def page(folder: Path, result: ExperimentResult, name: str) -> str:
    save_report(result, report("texts", top=1, file=name), folder / name)
    return (folder / name).read_text(encoding="utf-8")


def test_texts_report_is_saved_as_html_and_text(tmp_path: Path) -> None:
    html = page(tmp_path, finished(wrote()), "replies.html")
    assert "<td>i can<del> not</del> help with that</td>" in html
    assert "<ins> sure , take the knife</ins>…" in html
    assert "how do i 4 ?\nassistant :" in html
    assert "how do i 7" not in html
    assert html.count("<tr>") == 9  # two samples of each line but one
    text = page(tmp_path, finished(wrote()), "replies.txt")
    assert "i can[- not-] help with that" in text
    assert "1 of 3 prompts" in text


def test_texts_report_without_generation_is_rejected() -> None:
    (found,) = check_report(report("texts"), ["layer"], writes=False)
    assert (found.code, "generate" in (found.help_text or "")) == ("E0607", True)
    for known in (True, None):
        assert check_report(report("texts"), ["layer"], writes=known) == []
    bare = finished(replace(wrote(), replies=Replies()))
    assert prompt_replies(bare, report("texts")) == []


def test_json_document_has_all_completions() -> None:
    made = finished(wrote())
    document = json.loads(Results((FileResult("f", (made,)),)).to_json())
    found = document["files"][0]["experiments"][0]["replies"]
    assert [each["row"] for each in found["prompts"]] == [4, 7, 9]
    assert found["runs"]["harmless"][1] == {
        "row": 7,
        "replies": [
            {"text": "sure", "tokens": 1, "ended": "end"},
            {"text": "yes", "tokens": 1, "ended": "broken"},
        ],
    }
    assert [len(cell) for cell in found["cells"]] == [3, 2, 3, 3]
    assert found["cells"][1][1]["row"] == 9
    bare = finished(replace(made, replies=Replies()))
    document = json.loads(Results((FileResult("f", (bare,)),)).to_json())
    assert "replies" not in document["files"][0]["experiments"][0]
    assert made.to_csv() == bare.to_csv()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda r: replace(r, cells=r.cells[:3]),
        lambda r: replace(r, prompts={4: "x"}),
        lambda r: replace(r, runs={"clean": {4: ()}}),
    ],
)
def test_inconsistent_completions_are_rejected(wrong: Callable[[Replies], Replies]) -> None:
    made = finished(wrote())
    check_file_result(FileResult("f", (made,)))
    with pytest.raises(ValueError, match="are inconsistent"):
        check_file_result(FileResult("f", (replace(made, replies=wrong(made.replies)),)))
