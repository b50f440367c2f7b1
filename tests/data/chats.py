"""Tokenizers with chat templates as published models have them, and how transformers renders
them."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from mechdsl.prompts.tokens.chat import ChatTemplate
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from tests.data import support

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are brief.<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen's: no BOS token, and a default system turn."""

LLAMA = (
    "{{- bos_token }}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system = messages[0]['content'] | trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}\n"
    "{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}\n"
    "{{- 'Today Date: ' + date + '\n\n' }}\n{{- system }}\n{{- '<|eot_id|>' }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\n"
    "    {{- message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n"
)
"""As Llama 3's: a BOS token, a date, and texts stripped of surrounding white space."""

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
"""As Gemma 2's: no system turn, alternating turns, and turn markers that aren't special tokens."""

MISTRAL = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set rest = messages -%}{%- endif -%}"
    "{{ bos_token }}{%- for message in rest -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- if loop.last and system is defined -%}"
    "{{ '[INST] ' + system + '\n\n' + message['content'] + ' [/INST]' }}"
    "{%- else -%}{{ '[INST] ' + message['content'] + ' [/INST]' }}{%- endif -%}"
    "{%- else -%}{{ ' ' + message['content'] | trim + eos_token }}{%- endif -%}{%- endfor -%}"
)
"""As Mistral's: turn markers are plain text; the system text is part of the last user turn."""

MARKS: dict[str, tuple[str, ...]] = {
    CHATML: ("<|im_start|>", "<|im_end|>"),
    LLAMA: ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    GEMMA: ("<bos>", "<eos>"),
    MISTRAL: (),
}
PLAIN: dict[str, tuple[str, ...]] = {GEMMA: ("<start_of_turn>", "<end_of_turn>")}
BOS = {CHATML: None, LLAMA: "<|begin_of_text|>", GEMMA: "<bos>", MISTRAL: "<s>"}
EOS = {CHATML: "<|im_end|>", LLAMA: "<|eot_id|>", GEMMA: "<eos>", MISTRAL: "</s>"}
SHAPES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "mistral": MISTRAL}


@cache
def backend(shape: str) -> Tokenizer:
    """A small tokenizer with the turn markers of its template; it prepends the BOS token if it
    has one."""
    template = SHAPES[shape]
    made = support.metaspace() if shape == "mistral" else support.byte_level()
    made.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS[template]])
    plain = [AddedToken(mark, special=False, normalized=False) for mark in PLAIN.get(template, ())]
    made.add_tokens(plain)
    bos = BOS[template]
    if bos is not None:
        at = made.token_to_id(bos)
        first = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, at)])
        made.post_processor = first
    return made


@cache
def tokenizer(shape: str, bos: bool | None = None) -> TextTokenizer:
    template = SHAPES[shape]
    return support.wrapped(
        backend(shape),
        bos_token=BOS[template],
        eos_token=EOS[template],
        chat_template=template,
        bos=bos,
    )


def chat(shape: str) -> ChatTemplate:
    found = tokenizer(shape).chat
    assert found is not None
    return found


@cache
def library(shape: str) -> PreTrainedTokenizerFast:
    template = SHAPES[shape]
    names = {"bos_token": BOS[template], "eos_token": EOS[template]}
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend(shape), **{k: v for k, v in names.items() if v is not None}
    )
    made.chat_template = template.replace(
        "strftime_now('%d %b %Y') if strftime_now is defined else ", ""
    )
    return made


def by_library(shape: str, messages: list[tuple[str, str]]) -> tuple[str, list[int]]:
    """The text and the tokens that transformers returns for a list of turns."""
    turns = [{"role": role, "content": text} for role, text in messages]
    begun = messages[-1][0] == "assistant"
    asked = {"add_generation_prompt": not begun, "continue_final_message": begun}
    used: Any = library(shape)
    text = cast("str", used.apply_chat_template(turns, tokenize=False, **asked))
    ids = used.apply_chat_template(turns, tokenize=True, return_dict=False, **asked)
    return text, cast("list[int]", ids)
