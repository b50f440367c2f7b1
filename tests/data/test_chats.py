"""Rendered chat templates: tokens equal those of transformers, and turns and values have spans."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mechdsl.base import limits
from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.prompts.rows import BlockRows, PromptTable
from mechdsl.prompts.runs import RunRow
from mechdsl.prompts.table import (
    BlockCompiler,
    RowSelection,
    StandInTokenizer,
    build_table,
    replace_tokens,
)
from mechdsl.prompts.tokens.chat import ChatTemplate, parse_chat_template
from mechdsl.prompts.tokens.tokenizer import TextTokenizer

from . import chats, support

CHATS: dict[str, list[tuple[str, str]]] = {
    "one": [("user", "How many {x} is in Paris?")],
    "begun": [("user", "Total {x}"), ("assistant", "There is {x} and ")],
    "several": [("user", "  {x} in Rome "), ("assistant", "one"), ("user", "Zoë {x}?")],
}
SYSTEM: dict[str, list[tuple[str, str]]] = {
    "system": [("system", " question {x} "), ("user", "Part 1: {x} Count 1:")],
    "system, begun": [("system", "answer"), ("user", "{x}"), ("assistant", " {x} ")],
}
SHAPES = [
    (shape, name)
    for shape in chats.SHAPES
    for name in (*CHATS, *(SYSTEM if shape != "gemma" else ()))
    if (shape, name) != ("mistral", "system, begun")  # it leaves the system's text out there
]
VALUES = ["apple pie", "plum", " fig", "naïve\nkiwi"]


def turns_of(messages: list[tuple[str, str]]) -> str:
    return "chat { " + " ".join(f'{role} "{text}"' for role, text in messages) + " }"


def table(shape: str, messages: list[tuple[str, str]], **options: Any) -> PromptTable:
    values = ", ".join(json.dumps(value, ensure_ascii=False) for value in VALUES)
    body = f'x in [{values}]\n{turns_of(messages)}\nanswer "plum"'
    return support.table(body, chats.tokenizer(shape, **options))


def filled(row: RunRow, messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(role, text.replace("{x}", row.values["x"])) for role, text in messages]


@pytest.mark.parametrize(("shape", "name"), SHAPES)
def test_chat_text_and_tokens_equal_transformers(shape: str, name: str) -> None:
    messages = (CHATS | SYSTEM)[name]
    made = table(shape, messages)
    assert len(made) == len(VALUES)
    for row in made.runs["clean"].rows:
        text, ids = chats.by_library(shape, filled(row, messages))
        assert row.text == text
        assert list(row.ids) == ids


@pytest.mark.parametrize(("shape", "name"), SHAPES)
def test_each_turn_and_value_has_a_span(shape: str, name: str) -> None:
    messages = (CHATS | SYSTEM)[name]
    for row in table(shape, messages).runs["clean"].rows:
        said = filled(row, messages)
        for role in ("system", "user", "assistant"):
            own = [row.text[s.start : s.end].strip() for s in row.spans if s.name == role]
            assert sorted(own) == sorted(text.strip() for r, text in said if r == role)
        values = [s for s in row.spans if s.name == "x"]
        assert len(values) == sum(text.count("{x}") for _, text in messages)
        for span in values:
            assert row.text[span.start : span.end].strip() == row.values["x"].strip()
            around = [s for s in row.spans if s.name == span.within[0]]
            assert any(s.start <= span.start and span.end <= s.end for s in around)


@pytest.mark.parametrize("shape", ["llama", "gemma", "mistral"])
def test_chat_has_at_most_one_bos_token(shape: str) -> None:
    for bos, count in ((None, 1), (True, 1), (False, 0)):
        made = table(shape, CHATS["one"], bos=bos)
        begins = made.runs["clean"].rows[0]
        first = chats.tokenizer(shape).role_ids["bos"]
        assert begins.ids.count(first) == count
        assert begins.special.count(True) == count
        assert begins.special[0] is bool(count)
    assert table(shape, CHATS["one"]).conventions["bos"].endswith("(the chat template)")


def test_template_without_bos_gets_it_only_with_bos_true() -> None:
    """The tokenizer's default BOS token applies to plain templates only."""
    bare = chats.LLAMA.replace("{{- bos_token }}\n", "")
    for bos in (None, True):
        own = support.wrapped(
            chats.backend("llama"),
            bos_token="<|begin_of_text|>",
            chat_template=bare,
            bos=bos,
        )
        rows = support.table('chat { user "plum" }', own).runs["clean"].rows
        assert (rows[0].ids[0] == own.role_ids["bos"]) is bool(bos)
        plain = support.table('template "plum"', own).runs["clean"].rows
        assert plain[0].ids[0] == own.role_ids["bos"]


def test_turn_markers_are_prompt_tokens() -> None:
    shape = "chatml"
    made = table(shape, CHATS["several"])
    own = chats.tokenizer(shape)
    start = own.encode("<|im_start|>", add_special=False).ids
    assert len(start) == 1
    (everything,) = support.cells("tokens *", made, own)
    for row, hits in zip(made.runs["clean"].rows, everything.hits, strict=True):
        assert hits == (tuple(range(len(row.ids))),)
        assert row.ids.count(start[0]) == 5  # the template's own system turn, three, the opening
    (last,) = support.cells("last token", made, own)
    assert last.hits[0] == ((len(made.runs["clean"].rows[0].ids) - 1,),)


@pytest.mark.parametrize("shape", chats.SHAPES)
def test_turn_position_selects_tokens_of_its_turn(shape: str) -> None:
    made, own = table(shape, CHATS["several"]), chats.tokenizer(shape)
    for position, which in (("last-user token", -1), ("user 1 token", 0)):
        (cell,) = support.cells(position, made, own)
        for row, hits in zip(made.runs["clean"].rows, cell.hits, strict=True):
            turn = [s for s in row.spans if s.name == "user"][which]
            end = turn.start + len(row.text[turn.start : turn.end].rstrip())
            ((token,),) = hits
            low, high = row.offsets[token]
            assert low < end <= high
    (cell,) = support.cells("x 2 of user tokens", made, own)
    row = made.runs["clean"].rows[0]
    joined = "".join(row.text[slice(*row.offsets[t])] for t in cell.hits[0][0])
    assert row.values["x"].strip() in joined


def test_answer_continues_the_unfinished_reply() -> None:
    own = chats.tokenizer("llama")
    made = support.table(
        'x in ["plum", "fig"]\nchat { user "{x}?" assistant "There is" }\nanswer " {x}"', own
    )
    for row in made.runs["clean"].rows:
        _, ids = chats.by_library(
            "llama", [("user", f"{row.values['x']}?"), ("assistant", f"There is {row.values['x']}")]
        )
        assert [*row.ids, *row.texts["answer"].ids] == ids


def test_corruption_applies_to_chat_turns() -> None:
    own = chats.tokenizer("chatml")
    made = support.table(
        'x in ["plum", "fig"]\nchat { system "{x}" user "{x} in Rome" }\n'
        'corrupt other { x = other(x) }\ncorrupt thing { replace x of user token with "thing" }',
        own,
    )
    runs = made.runs
    for n, clean in enumerate(runs["clean"].rows):
        x, other = clean.values["x"], {"plum": "fig", "fig": "plum"}[clean.values["x"]]
        for run, said in (
            ("other", [("system", other), ("user", f"{other} in Rome")]),
            ("thing", [("system", x), ("user", "thing in Rome")]),
        ):
            text, ids = chats.by_library("chatml", said)
            assert runs[run].rows[n].text == text
            assert list(runs[run].rows[n].ids) == ids


def test_replaced_tokens_keep_a_single_bos_token() -> None:
    """The text is encoded without another BOS token."""
    own = chats.tokenizer("llama")
    made = support.table('x in ["plum", "fig"]\nchat { user "{x} in Rome" }', own)
    at = support.positions("x token")
    (cell,) = support.cells("x token", made, own)
    new = replace_tokens(made, "clean", at, cell, "thing", own)
    _, ids = chats.by_library("llama", [("user", "thing in Rome")])
    assert [list(row.ids) for row in new.rows] == [ids, ids]


def test_tokens_function_counts_tokens_of_a_value_in_the_chat() -> None:
    own = chats.tokenizer("llama")
    body = (
        'x in ["plum", "Vinson Massif", "apple pie"]\nchat { user "{x} in" }\nwhere tokens(x) = 1'
    )
    made = support.table(body, own)
    for row in made.runs["clean"].rows:
        (span,) = [s for s in row.spans if s.name == "x"]
        assert sum(a < span.end and b > span.start for a, b in row.offsets) == 1
    assert {row.values["x"] for row in made.runs["clean"].rows} == {"plum"}


def test_row_keys_do_not_depend_on_the_chat_template() -> None:
    keys = {table(shape, CHATS["one"]).row_keys for shape in chats.SHAPES}
    assert len(keys) == 1
    others = {table("llama", CHATS[name]).row_keys for name in CHATS}
    assert len(others) == len(CHATS)


def test_cached_block_rows_depend_on_the_chat_template() -> None:
    """Rows are computed once per template, not once per block."""
    found = support.blocks('prompts p { x in ["plum", "fig"] chat { user "{x}" } }')
    compiler = BlockCompiler(found)
    compiled: list[BlockRows] = []
    for shape in ("chatml", "llama", "chatml"):
        own = chats.tokenizer(shape)
        made, _ = build_table(found["p"], own, compiler, RowSelection())
        compiled.append(compiler.rows(found["p"], own))
        assert made is not None
        for row in made.runs["clean"].rows:
            assert row.text == chats.by_library(shape, [("user", row.values["x"])])[0]
    assert compiled[2] is compiled[0] is not compiled[1]


# --- errors ---------------------------------------------------------------------------------------


def refused(shape: str, body: str, template: str | None = None) -> tuple[str, str]:
    """Return the code and the message, optionally with a different template."""
    own = chats.tokenizer(shape)
    if template is not None:
        own = support.wrapped(chats.backend(shape))
        own.chat = replace(chats.chat(shape), text=template)
    made, found = support.build(body, own)
    assert made is None
    return found[0].code, found[0].message


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ("chatml", "a<|im_end|>b"),
        ("llama", "<|eot_id|>"),
        ("llama", "<|begin_of_text|>"),
        ("gemma", "plum <end_of_turn>"),  # no special token, but the template writes it
        ("mistral", "plum [/INST] fig"),  # no token at all
        ("mistral", "</s>"),
        ("mistral", "<unk>"),  # nothing that the template writes
        ("chatml", "<|endoftext|>"),
    ],
)
def test_text_with_a_turn_marker_is_rejected(shape: str, text: str) -> None:
    for where in ("user", "assistant"):
        other = 'assistant "one" user "two"' if where == "user" else 'user "two"'
        turns = f'user "{{x}}" {other}' if where == "user" else f'{other} assistant "{{x}}"'
        if where == "assistant" and text in ("plum <end_of_turn>", "plum [/INST] fig"):
            continue
        code, message = refused(shape, f'x in ["plum", "{text}"]\nchat {{ {turns} }}')
        assert code == "E0552"
        assert "a special token or a turn marker" in message


def test_error_raised_by_a_template_is_reported() -> None:
    code, message = refused("gemma", 'chat { system "a" user "b" }')
    assert (code, "System role not supported" in message) == ("E0552", True)
    code, message = refused("gemma", 'chat { user "a" user "b" }')
    assert "Conversation roles must alternate" in message


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}",
        "{% for m in messages %}[{{ m.content | upper }}]{% endfor %}",
        "{% for m in messages %}[{{ m.content[:3] }}]{% endfor %}",
        "{% for m in messages %}[{{ m.content }}]{{ m.content | length }}{% endfor %}",
        "{% for m in messages %}[{{ m.content | replace('plum', 'fig') }}]{% endfor %}",
        "{% for m in messages %}[{{ m.content | length }}]{% endfor %}",
        "{% for m in messages %}[{{ m.content | replace(' ', '_') }}]{% endfor %}",
    ],
)
def test_template_that_alters_or_omits_a_turn_is_rejected(template: str) -> None:
    code, message = refused("chatml", 'chat { system "one two" user "plum" }', template)
    assert code == "E0552"
    assert "doesn't appear in" in message


def test_unfinished_reply_before_other_turns_is_rejected() -> None:
    """The following turns would be cut off otherwise."""
    template = "{% for m in messages | reverse %}[{{ m.content }}]{% endfor %}"
    code, _ = refused("chatml", 'chat { user "plum" assistant "one two" }', template)
    assert code == "E0552"


HOSTILE = [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__()[0] }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ range(10**9) | list }}",
    "{{ 9**9**9 }}",
    "{{ 'a' * 10**15 }}",
    "{{ 10**15 * ['a'] }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x | tojson }}",
    "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = dict(a=n.x, b=n.x) %}"
    "{% endfor %}{{ n.x }}",
    "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "{{ ('a' * 9999) | list | join('b' * 99999) }}",
    "{{ ('b' * 99999).join(('a' * 9999) | list) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.encode() }}",
    "{{ '%0999999999999999d' % 1 }}",
    "{{ '%s' % 1 }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ messages | tojson(indent=10**15) }}",
    "{{ [{'a': 'b'}] | join(attribute='a') }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ lipsum(n=10**9) }}",
    "{{ messages | random }}",
    "{% for a in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
    "{{ nothing() }}",
]


@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_template_is_rejected_quickly(template: str) -> None:
    """A template that doesn't end would exceed the time limit of tests."""
    write = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    code, message = refused("chatml", 'chat { user "plum" }', template + write)
    assert code == ("E0551" if "random" in template else "E0552")  # there is no such filter
    assert "MemoryError" not in message  # the limit applies before the allocation


@pytest.mark.parametrize("template", ["{% for", "{{ a b }}", "{{" + "(" * 9_999, "a" * 200_001])
def test_unparsable_or_too_long_template_is_rejected(template: str) -> None:
    code, _ = refused("chatml", 'chat { user "plum" }', template)
    assert code == "E0551"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
        "{% macro say(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
        "{% set n = namespace(seen=false) %}{% for m in messages %}{% set n.seen = true %}"
        "{{ '[' ~ m.content ~ ']' }}{% endfor %}{{ n.seen }}{{ {'a': [1]} | tojson }}",
        "{{ messages | map(attribute='content') | join('|') }}{{ 'a,b'.split(',')[-1] }}",
        "{% if messages | selectattr('role', 'equalto', 'user') | list | length > 0 %}"
        "{{ messages[0].get('content') }}{% endif %}{{ documents is none and not tools }}",
        "{% for m in messages %}{% for k, v in m.items() %}{{ k }}: {{ v }}\n{% endfor %}"
        "{% endfor %}",
    ],
)
def test_jinja_features_render_as_in_transformers(template: str) -> None:
    """The reference is `render_jinja_template` of transformers."""
    messages = [{"role": "user", "content": "plum {x}"}]
    own = ChatTemplate(template, {"bos_token": "<s>"}, {})
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template([messages], chat_template=template, bos_token="<s>")
    body = 'chat { user "plum {{x}}" }'
    tokenizer = support.wrapped(chats.backend("chatml"))
    tokenizer.chat = own
    (row,) = support.table(body, tokenizer).runs["clean"].rows
    assert row.text == rendered[0][0]


THINKING = (
    "{%- for m in messages %}{%- if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{{ m.content }}\n</tool_response><|im_end|>\n{%- else %}{%- set text = m.content %}"
    "{%- if m.role == 'assistant' and '</think>' in text %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>\n{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{%- endif %}{%- endif %}"
)
"""As Qwen 3's: results of tools, thoughts that are left out of earlier replies, and an argument."""


@pytest.mark.parametrize("thinks", [None, False, True])
@pytest.mark.parametrize("messages", [[("user", "plum")], [("user", "plum"), ("tool", "fig 3")]])
def test_arguments_and_results_of_tools_render_as_in_transformers(
    thinks: bool | None, messages: list[tuple[str, str]]
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    arguments = {} if thinks is None else {"enable_thinking": thinks}
    told = [{"role": role, "content": text} for role, text in messages]
    rendered: Any = render_jinja_template(
        [told], chat_template=THINKING, add_generation_prompt=True, **arguments
    )
    line = "" if thinks is None else f"enable_thinking: {str(thinks).lower()} "
    own = support.wrapped(chats.backend("chatml"))
    own.chat = replace(chats.chat("chatml"), text=THINKING)
    made = support.table(turns_of(messages).replace("{ ", f"{{ {line}"), own)
    assert made.runs["clean"].rows[0].text == rendered[0][0]
    assert (f"enable_thinking: {thinks}".lower() in made.conventions["chat"]) is bool(line)
    roles = {span.name for span in made.runs["clean"].rows[0].spans}
    assert roles == {role for role, _ in messages}


def test_unread_argument_of_a_template_is_an_error() -> None:
    code, message = refused("chatml", 'chat { enable_thinkin: false user "a" }', THINKING)
    assert (code, "isn't a variable" in message) == ("E0207", True)


def test_reply_whose_thoughts_a_template_leaves_out_is_named() -> None:
    """Regression: E0552 marked the user's turn."""
    own = support.wrapped(chats.backend("chatml"))
    own.chat = replace(chats.chat("chatml"), text=THINKING)
    body = 'chat { user "plum" assistant "<think>\\nfig\\n</think>\\n3" }'
    made, found = support.build(body, own)
    assert made is None
    assert (found[0].code, found[0].span.written[:9]) == ("E0552", "assistant")


@pytest.mark.parametrize(
    ("bos", "text", "count"),
    [(None, "<|begin_of_text|>plum", 1), (False, "<|begin_of_text|>plum", 0), (None, "plum", 0)],
)
def test_two_beginnings_of_a_prompt_are_warned_about(
    bos: bool | None, text: str, count: int
) -> None:
    own = support.wrapped(chats.backend("llama"), bos_token="<|begin_of_text|>", bos=bos)
    _, found = support.build(f'template "{text}"', own)
    assert [each.code for each in found].count("W0707") == count


OPENING = (
    "{{ 'ask' if add_generation_prompt else 'go on' }}: "
    "{% for m in messages %}{{ m.content }};{% endfor %}"
)
TWICE = "{% for m in messages %}{{ m.content }} ({{ m.content }}){% endfor %}"


@pytest.mark.parametrize(
    ("template", "asks", "begun"),
    [
        (OPENING, "ask: plum;", "go on: plum;one two"),
        (TWICE, "plum (plum)", "plum (plum)one two (one two"),
    ],
)
def test_generation_prompt_is_added_or_the_reply_continues(
    template: str, asks: str, begun: str
) -> None:
    """An unfinished reply ends after its last occurrence in the rendered text."""
    tokenizer = support.wrapped(chats.backend("chatml"))
    tokenizer.chat = ChatTemplate(template, {}, {})
    said = [("user", "plum"), ("assistant", "one two")]
    for turns, text in ((said[:1], asks), (said, begun)):
        (row,) = support.table(turns_of(turns), tokenizer).runs["clean"].rows
        assert row.text == text


def test_template_digest_depends_on_text_and_tokens() -> None:
    own = chats.chat("llama")
    others = [
        replace(own, text=own.text + " "),
        replace(own, tokens={**own.tokens, "bos_token": "<s>"}),
        replace(own, added={**own.added, "<s>": True}),
    ]
    assert len({own.digest, *(each.digest for each in others)}) == 4
    assert replace(own, tokens=dict(reversed(list(own.tokens.items())))).digest == own.digest


# --- files ----------------------------------------------------------------------------------------


def folder(path: Path, config: dict[str, Any], files: dict[str, str]) -> TextTokenizer:
    chats.backend("llama").save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8")
    made, found = TextTokenizer.from_folder(path)
    assert made is not None
    assert not found
    return made


OTHER = "{{ eos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"chat_template": OTHER}, {}),
        ({"chat_template": [{"name": "tool", "template": "x"}, {"name": "default",
          "template": OTHER}]}, {}),
        ({"chat_template": "x"}, {"chat_template.jinja": OTHER}),
        ({}, {"chat_template.json": json.dumps({"chat_template": OTHER})}),
    ],
)  # fmt: skip
def test_chat_template_is_read_from_each_supported_file(
    tmp_path: Path, config: dict[str, Any], files: dict[str, str]
) -> None:
    special = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}}
    own = folder(tmp_path, {**special, **config}, files)
    (row,) = support.table('chat { user "plum" }', own).runs["clean"].rows
    assert row.text == "<|eot_id|>plum"
    plain = folder(tmp_path, special, dict.fromkeys(files, ""))
    assert plain.chat is None
    assert not own.same_as(plain)


def test_tokenizer_without_chat_template_rejects_chat(tmp_path: Path) -> None:
    own = folder(tmp_path, {"chat_template": [{"name": "tool", "template": "x"}]}, {})
    assert own.chat is None
    _, found = support.build('chat { user "plum" }', own)
    assert [d.code for d in found] == ["E0550"]
    assert parse_chat_template({"default": "x"}, {}, {}) == ChatTemplate("x", {}, {})


def test_missing_model_gets_no_chat_template_errors() -> None:
    body = 'x in ["plum", "fig<|im_end|>"]\nchat { system "{x}" user "{x}" }'
    made = support.table(body, StandInTokenizer())
    assert {s.name for s in made.runs["clean"].rows[0].spans} == {"system", "user", "x"}
    text = (
        'mech 1\nmodel m = hf("nobody/nothing")\nprompts p { '
        + body.replace("\n", " ")
        + " corrupt o { x = other(x) } }\n"
        'experiment e { prompts p from o into clean patch resid_post layer 0 at "<|im_end|>" token,'
        " last-user token, x of system token measure entropy as delta }\n"
    )
    found = check_source(Source(text), CheckSettings()).diagnostics
    assert not has_errors(found), [(d.code, d.message) for d in found]


def test_conventions_report_a_template_without_a_start_of_a_reply() -> None:
    said = table("mistral", CHATS["one"]).conventions["chat"]
    assert "without a start of a reply (it doesn't read `add_generation_prompt`)" in said


def test_conventions_report_the_template_date() -> None:
    said = table("llama", CHATS["one"]).conventions["chat"]
    assert "the template's date is 26 July 2024" in said
    assert "start of a reply" in said
    assert "unfinished reply" in table("chatml", CHATS["begun"]).conventions["chat"]
    assert "July" not in table("chatml", CHATS["begun"]).conventions["chat"]
    assert "26 Jul 2024" in table("llama", CHATS["one"]).runs["clean"].rows[0].text


def test_too_long_rendered_chat_is_rejected() -> None:
    code, message = refused(
        "chatml",
        'chat { user "plum" }',
        "{{ messages[0].content }}" + "a" * (limits.TEXT + 1),
    )
    assert code == "E0552"
    assert "characters" in message
