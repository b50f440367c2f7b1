"""Random hostile files: each kind is a function from a generator to a folder of files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(
    [*(ROOT / "examples").glob("*.mech"), *(ROOT / "tests" / "syntax" / "examples").rglob("*.mech")]
)
ZOO = ROOT / "mechdsl" / "zoo" / "counting"
FILE = "case.mech"
MODEL = "model"
"""The folder of a model next to the file."""

PIECE = re.compile(r'"[^"\n]*"|\w+|\s+|[^\w\s]')
NUMBER = re.compile(r"(?<![\w.])[0-9]+(?![\w.])")
JUNK = (
    *'{}()[]"#,.;:=+-*/<>%!?$@\\~`\n\t\0é“𝄞',
    *(
        "..",
        "->",
        "!=",
        "\r\n",
        "\ufeff",
        "\u202e",
        "\x1b[31m",
        "experiment",
        "prompts",
        "for l in",
    ),
    *("not ", "tokens except ", "0", "999999999999", "1e308", "-1", "{x}", "words(tniy)", "*"),
)
NUMBERS = (
    *("0", "1", "-1", "7", "200", "1001", "99999", "1000000000", "9" * 25, "9" * 310, "1e308"),
    *("0.5", "0.0000001", "1e-300", "100%", "101%", "0..9", "9..0", "0..99999999999999999999"),
)
VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 7, 1001, 10**9, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf")),
    *(True, False, None, "", "4", "gelu", "x" * 5000, [], [1], ["x", None], {}, {"a": 1}),
)
"""Values for keys of a JSON file."""
MORE_KEYS = (
    *("num_key_value_heads", "head_dim", "layer_types", "num_local_experts", "vision_config"),
    *("text_config", "is_encoder_decoder", "mlp_only_layers", "qk_nope_head_dim", "ffn_config"),
)
"""Optional keys of `config.json`."""
LINES = {
    "value": (
        *("item in {}", "item in 0..3 where {}", "item = {}", "x = {}", 'item in ["a", {}]'),
        *("item in {} step 0.001", 'item = list(item, {}, sep: " ")'),
    ),
    "rule": (
        *("patch {} at last token", "patch layer {} at last token", "ablate layer 0 head {} at "),
        *("patch resid_post layer * at {}", "replace {} with zero", "for l in {} {{ patch L0 }}"),
    ),
    "metric": ("measure {} as delta", "measure logit({}) as delta", "keep {}", "expect {}"),
}
NESTED = (
    *(("(", "1", ")"), ("[", "1", "]"), ("{", "last token", "}"), ("not ", "item = 1", "")),
    *(("-", "1", ""), ("tokens except ", "last token", ""), ("abs(", "logit(answer)", ")")),
    *(
        ("1 + ", "1", ""),
        ("if a then b else ", "1", ""),
        ("choice(", "item", ")"),
        ("1, ", "1", ""),
    ),
    *(("a and ", "a", ""), ('"{', "item", '}"'), ("for l in 0..2 { ", "patch L0", " }")),
    *(
        ("answer of fewer of ", "x", ""),
        ("a.", "b", ""),
        ("item in ", "1", ""),
        ("list(", "1", ")"),
    ),
)

Files = Mapping[str, bytes]


def program(value: str = "", rule: str = "", measure: str = "", model: str = "") -> str:
    """A small file with replaceable parts."""
    return f"""mech 1
model toy = {model or 'zoo("counting")'}
prompts p {{
  {value or 'item in ["fig", "pear"]'}
  template "Part 1: {{item}} Count 1:"
  answer " 1"
  corrupt fewer {{ item = other(item) }}
}}
experiment e {{
  model toy
  prompts p limit 4
  from clean into fewer
  {rule or "patch resid_post layer * at last token"}
  {measure or "measure logit(answer) as delta"}
}}
"""


def example(draw: Random) -> str:
    return draw.choice(EXAMPLES).read_text("utf-8")


def bytes_(draw: Random) -> Files:
    """Random bytes, alone or within a file."""
    junk = draw.randbytes(draw.choice((0, 1, 40, 4000)))
    text = example(draw).encode() if draw.random() < 0.7 else b""
    at = draw.randint(0, len(text))
    return {FILE: text[:at] + junk + text[at:]}


def truncated(draw: Random) -> Files:
    """A truncated file, or one that begins in the middle."""
    text = example(draw)
    cut = draw.randint(0, len(text))
    return {FILE: (text[:cut] if draw.random() < 0.7 else text[cut:]).encode()}


def mutated(draw: Random) -> Files:
    """Words and punctuation omitted, doubled, swapped or replaced."""
    pieces = PIECE.findall(example(draw))
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        a, b = draw.randrange(len(pieces)), draw.randrange(len(pieces))
        match draw.randrange(5):
            case 0:
                pieces[a] = ""
            case 1:
                pieces[a] *= 2
            case 2:
                pieces[a], pieces[b] = pieces[b], pieces[a]
            case 3:
                pieces[a] = draw.choice(JUNK)
            case _:
                pieces[a] = pieces[b]
    return {FILE: "".join(pieces).encode("utf-8", "replace")}


def numbers(draw: Random) -> Files:
    """A file with one number replaced."""
    text = example(draw)
    places = list(NUMBER.finditer(text))[1:]  # without the version
    if not places:
        return {FILE: text.encode()}
    place = draw.choice(places)
    return {FILE: f"{text[: place.start()]}{draw.choice(NUMBERS)}{text[place.end() :]}".encode()}


def nested(draw: Random) -> Files:
    """A construct within itself, many times."""
    before, middle, behind = draw.choice(NESTED)
    count = draw.choice((3, 40, 99, 101, 190, 205, 600, 3000))
    part = draw.choice(("value", "rule", "metric"))
    line = draw.choice(LINES[part]).replace("{{", "{").replace("}}", "}")
    written = line.replace("{}", before * count + middle + behind * count)
    keys = {"value": "value", "rule": "rule", "metric": "measure"}
    return {FILE: program(**{keys[part]: written}).encode()}


def long(draw: Random) -> Files:
    """A valid part repeated many times, or a very long one."""
    count = draw.choice((10, 300, 1500, 20_000))
    match draw.randrange(9):
        case 0:
            text = program(value="\n".join(f"v{i} = {i}" for i in range(count)))
        case 1:
            chain = "\n".join(f"v{i} = v{i - 1} + 1" for i in range(1, count))
            text = program(value=f"v0 in 0..3\n{chain}")
        case 2:
            metrics = "\n".join(f"metric m{i} = m{i - 1} + 1" for i in range(1, count))
            text = program(measure="measure m1 as delta")
            text = text.replace(
                "prompts p {", f"metric m0 = logit(answer)\n{metrics}\nprompts p {{"
            )
        case 3:
            text = program(rule="patch resid_post layer 1 at last token\n" * count)
        case 4:
            text = program(rule="patch resid_post layer " + "1, " * count + "1 at last token")
        case 5:
            text = program() + "seed 1\n" * count
        case 6:
            text = program(value="item in [" + ", ".join(f'"w{i}"' for i in range(count)) + "]")
        case 7:
            text = program() + draw.choice(("x", "é", "# ", "; ", '"')) * count
        case _:
            text = program(value=f"item in 0..{10 ** draw.randint(1, 12)}").replace(" limit 4", "")
    return {FILE: text.encode()}


def _model(draw: Random, change: Callable[[str, bytes], bytes]) -> Files:
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    files = {f"{MODEL}/{name}": change(name, (ZOO / name).read_bytes()) for name in names}
    rule = draw.choice(
        ("layer * head *", "layer 1 neuron *", "resid_post layer *", "L1H1", "embed")
    )
    text = program(model=f'local("{MODEL}")', rule=f"patch {rule} at last token")
    return {FILE: text.encode(), **files}


def config(draw: Random) -> Files:
    """A model with an invalid `config.json`."""

    def change(name: str, content: bytes) -> bytes:
        if name != "config.json":
            return content
        found: dict[str, Any] = json.loads(content)
        for _ in range(draw.choice((1, 1, 2, 4))):
            sizes = [key for key, value in found.items() if type(value) is int]
            key = draw.choice(draw.choice((sizes, list(found), MORE_KEYS)))
            found[key] = draw.choice(VALUES)
        return json.dumps(found).encode()

    return _model(draw, change)


def tokenizer(draw: Random) -> Files:
    """A model whose tokenizer files are broken."""

    def change(name: str, content: bytes) -> bytes:
        return content if name == "config.json" else _broken_json(draw, content)

    return _model(draw, change)


def _broken_json(draw: Random, content: bytes) -> bytes:
    match draw.randrange(4):
        case 0:
            return content[: draw.randrange(len(content))]
        case 1:
            depth = draw.choice((40, 60, 900, 50_000))
            return b"[" * depth + b"]" * depth
        case 2:
            found: Any = json.loads(content)
            inner = found
            while isinstance(inner, dict) and inner:
                key = draw.choice(sorted(inner))
                if not isinstance(inner[key], dict) or draw.random() < 0.3:
                    inner[key] = draw.choice(VALUES)
                    break
                inner = inner[key]
            return json.dumps(found).encode()
        case _:
            at = draw.randrange(len(content))
            return content[:at] + draw.randbytes(3) + content[at:]


def data(draw: Random) -> Files:
    """A broken or unusual data file."""
    ending = draw.choice(("csv", "tsv", "jsonl", "json"))
    rows: list[dict[str, Any]] = [
        {"item": draw.choice(("fig", "pear", "", *VALUES)), "n": n} for n in range(4)
    ]
    if ending in ("csv", "tsv"):
        sign = "," if ending == "csv" else "\t"
        text = "\n".join([f"item{sign}n", *(f"{r['item']}{sign}{r['n']}" for r in rows)])
        if draw.random() < 0.5:
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(('"', "\n", sign, "\0", "é" * 9, "9" * 5000)) + text[at:]
        content = text.encode("utf-8", "replace")
    else:
        lines = [json.dumps(row) for row in rows]
        text = "\n".join(lines) if ending == "jsonl" else f"[{','.join(lines)}]"
        content = _broken_json(draw, text.encode()) if ending == "json" else text.encode()
        if draw.random() < 0.3:
            content = content.replace(b"fig", b"\\ud800")
    text = program(
        value=f'rows "data.{ending}"',
        rule=draw.choice(("", "ablate embed at item token with zero")),
    )
    return {FILE: text.encode(), f"data.{ending}": content}


KINDS: Mapping[str, Callable[[Random], Files]] = {
    "bytes": bytes_,
    "truncated": truncated,
    "mutated": mutated,
    "numbers": numbers,
    "nested": nested,
    "long": long,
    "config": config,
    "tokenizer": tokenizer,
    "data": data,
}


def case(kind: str, seed: int) -> Files:
    """The files of one case; the same number gives the same files."""
    return KINDS[kind](Random(f"{kind} {seed}"))
