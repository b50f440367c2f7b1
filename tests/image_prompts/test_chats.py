"""Chats with images, against the rendering by transformers with the model's processor."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import render_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.images.picture import _CLOSE, _OPEN
from mechdsl.loading.loader import adopt_model
from mechdsl.prompts.tokens.chat import ChatProblem, ChatTemplate, Turn
from mechdsl.prompts.values import RichText
from mechdsl.results.experiment_result import FileResult

from ..execute.support import MODES, run_on
from ..shared_models import unchanged
from . import support
from .reference import Bare, at
from .support import RECORDS, experiment, succeeded

LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'] + ' : ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image> ' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'answer :' }}{% endif %}"
)
"""As LLaVA's: list content only, images before texts."""

SMOL = (
    "{% for message in messages %}{{ message['role'] + ' : ' }}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ ' <image> ' }}{% endif %}{% endfor %}{{ ' and ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'answer :' }}{% endif %}"
)
"""As SmolVLM's: parts in their order."""

QWEN = (
    "{% for message in messages %}{{ 'in ' + message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ 'first <image> second ' }}{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' and ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'answer :' }}{% endif %}"
)
"""As Qwen2-VL's: text or list content; only lists get the tokens around images."""

TEXTS = (
    "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' and ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'answer :' }}{% endif %}"
)
"""Texts only."""

NO_IMAGES = SMOL.replace(" <image> ", " ")
TEMPLATES = {"llava": LLAVA, "smol": SMOL, "qwen": QWEN, "texts": TEXTS, "none": NO_IMAGES}

BLOCK = """
prompts ask {
  rows "data.jsonl"
  image photo = "{file}"
  image second = "{other}"
  chat {
    TURNS
  }
  answer " {n}"
  wrong " {m}"
}
"""
TURNS: dict[str, list[tuple[str, list[str]]]] = {
    "one": [("user", ["photo", "how many {what} are there ?"])],
    "after": [("user", ["how many {what} are there ?", "photo"])],
    "two": [
        ("user", ["photo", "and", "second", "what is in the picture ?"]),
        ("assistant", ["red {what}"]),
        ("user", ["how many {what} ?"]),
    ],
}
"""Turns of each chat: roles with texts and names of images."""
IMAGES = ("photo", "second")


def written(name: str) -> str:
    """A chat in `.mech` syntax."""
    lines = [
        f'{role} "{" ".join("{" + each + "}" if each in IMAGES else each for each in parts)}"'
        for role, parts in TURNS[name]
    ]
    return BLOCK.replace("TURNS", "\n    ".join(lines))


@cache
def model(template: str) -> tuple[Bare, LoadedModel]:
    own = Bare.of_folder(support.folder_of("llava"))
    own.processor.chat_template = TEMPLATES[template]
    made, found = adopt_model("m", own.model, own.processor)
    assert made is not None, found
    return own, unchanged(made)


def inputs(template: str, chat: str, number: int) -> dict[str, torch.Tensor]:
    """The prompt of a record as transformers renders it."""
    own, row = model(template)[0], RECORDS[number]
    files = [row["file" if each == "photo" else "other"] for each in named(chat)]
    messages: list[dict[str, Any]] = [
        {
            "role": role,
            "content": [
                {"type": "image"}
                if each in IMAGES
                else {"type": "text", "text": each.format(**row)}
                for each in parts
            ],
        }
        for role, parts in TURNS[chat]
    ]
    if template == "texts":
        for message in messages:
            parts = (part.get("text", "<image>") for part in message["content"])
            message["content"] = " ".join(parts)
    text = own.processor.apply_chat_template(messages, add_generation_prompt=True)
    folder = support.folder_of("llava")
    given = own.inputs(text, [folder / str(file) for file in files])
    cut = {"input_ids", "attention_mask"}  # a chat template writes the first token itself
    return {key: value[:, 1:] if key in cut else value for key, value in given.items()}


def named(chat: str) -> list[str]:
    return [each for _, parts in TURNS[chat] for each in parts if each in IMAGES]


def difference(own: Bare, logits: torch.Tensor, number: int) -> float:
    words = own.processor.tokenizer.convert_tokens_to_ids
    row = RECORDS[number]
    return float(logits[-1, words(str(row["n"]))] - logits[-1, words(str(row["m"]))])


def run(template: str, chat: str, rule: str) -> tuple[FileResult | None, list[Diagnostic]]:
    text = experiment("e", f"ablate resid_post layer 0 at {rule} with zero")
    file = f'mech 1\nmodel m = local("handed over")\n{written(chat)}\n{text}'
    source = Source(file, support.folder_of("llava") / "file.mech")
    return run_on(source, {"m": model(template)[1]}, MODES["planned"])


def check(template: str, chat: str, rule: str, where: Callable[[list[int], int], range]) -> None:
    """Compare values without and with zeros at some tokens.

    where: these tokens, given those of the images and the number of the record.
    """
    own = model(template)[0]
    found = succeeded(*run(template, chat, rule))["e"]
    base: list[float] = []
    patched: list[float] = []
    for n in range(len(RECORDS)):
        given = inputs(template, chat, n)
        base.append(difference(own, own.run(given), n))
        edit = at(where(own.image_tokens(given), n), torch.zeros(()))
        patched.append(difference(own, own.run(given, blocks={0: edit}), n))
    measure = found.measures[0]
    np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
    np.testing.assert_allclose(measure.patched[0], patched, atol=1e-4)
    assert np.abs(np.array(base) - patched).max() > 0.1


@pytest.mark.parametrize("chat", TURNS)
@pytest.mark.parametrize("template", ["llava", "smol", "qwen", "texts"])
def test_chat_with_images_equals_transformers(template: str, chat: str) -> None:
    """Prompts differ in length; a rule ablates tokens of one image."""

    def rows(tokens: list[int], n: int) -> range:
        first = tokens[named(chat).index("photo") * 9]
        return range(first, first + 6)

    check(template, chat, "photo row 1..2 col * tokens", rows)


def test_turn_span_includes_its_images() -> None:
    def turn(tokens: list[int], n: int) -> range:
        words = f"how many {RECORDS[n]['what']} are there ?".split()
        return range(tokens[0], tokens[0] + 9 + len(words))

    check("llava", "one", "user tokens", turn)


def test_chat_template_that_omits_images_is_rejected() -> None:
    result, found = run("none", "two", "photo tokens")
    assert result is None
    [error] = [each for each in found if each.severity == "error"]
    assert error.code == "E0552"
    shown = " ".join(render_full([error], color=False, width=1000).split())
    assert "it writes `<image>` 0 times, for 2 images" in shown


def test_changed_turn_after_a_turn_with_an_image_is_named() -> None:
    """Regression: parts of turns were counted, beyond the last turn."""
    template = (
        "{% for m in messages %}[{% for part in m.content %}{% if part.type == 'image' %}<image>"
        "{% else %}{{ part.text | upper if m.role == 'assistant' else part.text }}{% endif %}"
        "{% endfor %}]{% endfor %}"
    )
    own = ChatTemplate(template, {}, {}, image="<image>")
    marker = f"{_OPEN}image a #0f 4 x 4{_CLOSE}"
    turns = (
        Turn("user", RichText(f"see {marker} now")),
        Turn("assistant", RichText("plum")),
        Turn("user", RichText("fig")),
    )
    with pytest.raises(ChatProblem) as raised:
        own.written(turns)
    assert raised.value.turn == 1
