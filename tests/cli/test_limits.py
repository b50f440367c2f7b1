"""Hostile files: each is rejected with its reason. `tests/fuzz` generates more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mechdsl.base import limits
from mechdsl.base.files import load_json
from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.prompts import RowsNotChecked
from mechdsl.diagnostics.rendering import render_full

from ..fuzz.cases import FILE, ZOO, program
from ..fuzz.commands import say, write

NESTED_VALUES = "\n".join(f"v{i} = v{i - 1} + {'0 + ' * 60}0" for i in range(1, 30))
NESTED_METRICS = "\n".join(f"metric m{i} = m{i - 1} + {'1 + ' * 60}1" for i in range(1, 30))


def chain(length: int, link: str = "") -> str:
    metrics = "\n".join(f"metric m{i} = m{i - 1}{link}" for i in range(1, length))
    text = program(measure=f"measure m{length - 1} as delta")
    return text.replace("prompts p {", f"metric m0 = logit(answer)\n{metrics}\nprompts p {{")


def check(text: str, folder: Path | None = None) -> list[Diagnostic]:
    source = Source(text, None if folder is None else folder / FILE)
    settings = CheckSettings(prompts_enough=limits.CHECKED_PROMPTS, require_models=True)
    return check_source(source, settings).diagnostics


def errors(text: str, folder: Path | None = None) -> list[str]:
    return [d.code for d in check(text, folder) if d.severity == "error"]


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (program("item in words(tniy)"), "E0201", "`tniy`"),
        (program("item in 0..9999999999999999999999"), "E0506", "1,000,000,000,000"),
        (program("item in 0..1 step 0.0000000000000000000001"), "E0506", "1,000,000,000,000"),
        (program(model='local("~nouser/x")'), "E0401", "~nouser/x"),
        (program(model=f'local("{"x" * 5000}")'), "E0401", "there is no model"),
        (program(model='local("~nouser/x-*")'), "E0401", "there is no model"),
        (program(f'rows "{"x" * 5000}/y.csv"'), "E0504", "y.csv"),
        ("mech 1\n" + "param " + "x" * 5000 + " = 1", "E0109", "the limit is 200"),
        (program(rule="patch L0 at " + "tokens except " * 600 + "last token"), "E0109", "200 deep"),
        (chain(400), "E0207", "more than 50 metrics"),
        (chain(400, " + 1"), "E0207", "more than 50 metrics"),
        (chain(40, f" + {'1 + ' * 60}1"), "E0207", "nested more than 200 levels deep"),
        (program(f"item in 0..3\n v0 = item\n{NESTED_VALUES}"), "E0506", "nested parts"),
        (program("item in 2..9\n x = item" + " * 9" * 150 + " * x0\n x0 = item" + " * 9" * 190),
         "E0503", "more than 300 digits"),
        (program(rule="patch layer 0 neuron 0..9 at token 0..99999999999"), "E0310", "outside"),
    ],
)  # fmt: skip
def test_hostile_file_is_rejected_with_its_reason(text: str, code: str, said: str) -> None:
    found = [d for d in check(text) if d.severity == "error"]
    assert code in [d.code for d in found], render_full(found)
    assert said in render_full(d for d in found if d.code == code)


def test_unknown_model_in_words_is_reported_once() -> None:
    assert errors(program("item in words(tniy)")) == ["E0201"]


def model(folder: Path, **changes: object) -> str:
    """Return a program whose model is the zoo model with other config entries."""
    (folder / "model").mkdir()
    for file in ZOO.glob("*.json"):
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    config = json.loads((ZOO / "config.json").read_text()) | changes
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return program(model='local("model")', rule="patch layer * head * at last token")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"num_hidden_layers": 10**9}, "E0430"),
        ({"num_hidden_layers": 10**30}, "E0430"),
        ({"num_attention_heads": 10**9}, "E0430"),
        ({"hidden_size": 10**9}, "E0430"),
        ({"vocab_size": 10**18}, "E0430"),
        ({"num_local_experts": 10**9}, "E0430"),
        ({"num_hidden_layers": 1000, "num_attention_heads": 10_000}, "E0323"),
        ({"num_hidden_layers": "4"}, "E0420"),
        ({"num_hidden_layers": 4.5}, "E0420"),
        ({"architectures": 3}, "E0404"),
        ({"layer_types": 3}, "E0404"),
    ],
)
def test_hostile_model_config_is_rejected(
    tmp_path: Path, changes: dict[str, object], code: str
) -> None:
    assert errors(model(tmp_path, **changes), tmp_path) == [code]


def test_config_of_doge_is_accepted(tmp_path: Path) -> None:
    """Doge configs have this number of experts, even for models without experts."""
    assert "E0430" not in errors(model(tmp_path, num_experts=16_384), tmp_path)


def test_deeply_nested_json_is_rejected(tmp_path: Path) -> None:
    deep = "[" * 50_000 + "]" * 50_000
    text = model(tmp_path)
    (tmp_path / "model" / "tokenizer_config.json").write_text(deep)
    assert errors(text, tmp_path) == []  # it only names special tokens
    (tmp_path / "model" / "config.json").write_text(deep)
    assert errors(text, tmp_path) == ["E0404"]
    for ending in ("json", "jsonl"):
        (tmp_path / f"data.{ending}").write_text(deep)
        assert errors(program(f'rows "data.{ending}"'), tmp_path) == ["E0505"]
    assert load_json("[" * 50 + '"' + "[" * 99 + '"' + "]" * 50)
    with pytest.raises(ValueError, match="more than 50 deep"):
        load_json("[" * 51 + "]" * 51)


def test_lone_surrogate_in_data_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"item": "\\ud800"}\n{"item": "fig"}\n')
    assert errors(program('rows "data.jsonl"'), tmp_path) == ["E0505"]


@pytest.mark.parametrize(
    "name",
    [
        "it\u0733em",
        "éa",
        "aé",
        "L0H1",
        "L3",
        "first",
        "in",
        "not",
        "a b",
        "",
        "{",
        "1",
        "patch",
        "i" + "9" * 5000,
    ],
)
def test_data_column_may_have_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{name: 1, "n": 0}, {"item": 2, "n": 1}]))
    found = errors(program('rows "data.json"'), tmp_path)  # rows can't be built
    assert sorted(found) == ["E0503", "E0512"]  # the first row built depends on the content


def test_data_may_have_any_number_of_columns(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{f"{'c' * 90}{n}": n for n in range(1200)}]))
    found = errors(program('rows "data.json"').replace("{item}", "{x}"), tmp_path)
    assert set(found) == {"E0501"}


def test_long_table_is_checked_partially() -> None:
    long = program('item in ["fig", "pear"]\nn in 1..3000\nwhere n > 0').replace(" limit 4", "")
    short = CheckSettings(prompts_enough=200)
    found = check_source(Source(long), short).diagnostics
    (cut,) = [d for d in found if d.code == "W0790"]
    assert "first 100 rows" in cut.message
    for text in (program(), long.replace("3000", "9")):
        assert "W0790" not in [d.code for d in check_source(Source(text), short).diagnostics]


LISTS = program('n in 1..100\nitem in ["fig", "pear"]\nxs = list(item, 2000, sep: " ")')
COLUMNS = ",".join(f"c{n}" for n in range(60))
WIDE = f"item,{COLUMNS}\n" + "\n".join(
    ",".join(f"{row}{n}" for n in range(61)) for row in range(2000)
)


@pytest.mark.parametrize(
    ("text", "most"),
    [
        (LISTS.replace("{item} Count", "{xs} Count"), 20),
        (LISTS.replace("{item} Count", "{xs} Count").replace("other(item)", '"x"'), 20),
        (program('item in ["fig", "pear"]\nn in 1..400\nk = choice(' + "1, " * 900 + "1)"), 50),
        (program('item in ["fig", "pear"]\nn in 1..400\nwhere n in [' + "1, " * 900 + "n]"), 100),
        (program('rows "wide.csv"'), 1000),
        (program("n in 1..400\n" + "".join(f"v{i} = n + {i}\n" for i in range(100))
                 + 'item in ["fig", "pear"]'), 400),
        (program(measure="".join(f"measure logit(answer) + {i} as delta\n" for i in range(99)),
                 value='item in ["fig", "pear"]\nn in 1..2000'), 900),
    ],
)  # fmt: skip
def test_check_limits_rows_by_their_cost(text: str, most: int, tmp_path: Path) -> None:
    (tmp_path / "wide.csv").write_text(WIDE)
    found = check(text.replace(" limit 4", ""), tmp_path)
    (cut,) = [d for d in found if d.code == "W0790"]
    assert isinstance(cut, RowsNotChecked)
    assert 5 <= cut.rows <= most


def test_repeated_row_draws_are_limited() -> None:
    text = program('item in ["fig", "pear"]\nxs = list(item, 3, sep: " ")')
    text = text.replace("{item} Count", "{xs} Count").replace("limit 4", "limit 30")
    found = check_source(Source(text), CheckSettings(prompts_enough=20)).diagnostics
    assert "W0790" in [d.code for d in found]


def test_search_for_an_unsatisfiable_condition_is_limited() -> None:
    text = program('item in ["fig", "pear"]\nn in 1..100000\nwhere n < 0')
    found = check_source(Source(text), CheckSettings(prompts_enough=20)).diagnostics
    assert [d.code for d in found] == ["W0790"]
    found = check_source(Source(text.replace("100000", "9"))).diagnostics
    assert [d.code for d in found] == ["E0509"]


def test_partial_check_gives_no_warning_of_too_few_prompts() -> None:
    """W0720 isn't reported for the few rows that a check covers."""
    text = program('item in ["fig", "pear"]\nn in 1..100', "patch layer * head * at last token")
    text = text.replace("limit 4", "limit 100").replace("as delta", "as recovery")
    found = check_source(Source(text), CheckSettings(prompts_enough=10)).diagnostics
    assert [d.code for d in found] == ["W0790"]
    found = check_source(Source(text.replace("limit 100", "limit 5"))).diagnostics
    assert [d.code for d in found] == ["W0720"]


def test_check_limits_random_control_draws() -> None:
    heads = "layers 0..3 heads 0..1"  # there are 6⁴ such targets
    text = program(rule=f"patch {heads} at last token\n  against random(300)")
    for settings, draws in (
        (CheckSettings(prompts_enough=9), limits.CHECKED_DRAWS),
        (CheckSettings(), 300),
    ):
        (experiment,) = check_source(Source(text), settings).experiments
        assert experiment.control is not None
        assert experiment.control.draws == draws


def test_condition_list_accepts_ranges() -> None:
    text = program('item in ["fig", "pear"]\nn in 1..6\nwhere n in [2..3, 5, 9..10000]')
    (experiment,) = check_source(Source(text.replace("limit 4", ""))).experiments
    assert {row.values["n"] for row in experiment.table.runs["clean"].rows} == {2, 3, 5}


def test_import_chain_is_limited(tmp_path: Path) -> None:
    count = limits.FILES + 20
    for n in range(count):
        (tmp_path / f"{n}.mech").write_text(f'mech 1\nuse "{n + 1}.mech"\n')
    (tmp_path / f"{count}.mech").write_text("mech 1\nseed 1\n")
    assert errors(f'mech 1\nuse "0.mech"\n{program()[7:]}', tmp_path) == ["E0204"]


def test_printed_diagnostics_are_limited() -> None:
    found = check("mech 1\n" + "\n".join(f"param a{n} = 1" for n in range(1500)) + program()[7:])
    text = render_full(found)
    assert text.count("warning[") == limits.DIAGNOSTICS
    assert "showing the first 1,000, errors first" in text.splitlines()[-1]


def test_no_command_fails_internally_on_a_hostile_file(tmp_path: Path) -> None:
    file = write({FILE: program("item in words(tniy)").encode()}, tmp_path)
    for command in ("validate", "plan", "graph", "explain", "fmt"):
        assert say(command, file).broke is None
