"""Whisper, whose encoder reads the sound of a prompt, against plain hooks on the bare model with
features that its extractor computes from the samples of this module."""

from __future__ import annotations

import json
import wave
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from mechdsl.base import limits
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.models import UnpreparedImages
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.images.picture import PictureChange
from mechdsl.images.sounds import GENERATED_SOUNDS, Sound, inspect_sound, render_samples
from mechdsl.loading.identity import compute_identity
from mechdsl.loading.loader import adopt_model
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from ..execute.encoder_decoders import (
    Place,
    Write,
    changed,
    copied_columns,
    last_query_without,
    zeroed,
)
from ..execute.support import MODES, run_on
from ..parsing import format_file, parse
from ..run_source import run_source
from ..shared_models import unchanged
from . import models
from .support import check_rules, experiment, succeeded

RATE, SECOND, FRAMES, HEADS, LAYERS = 1_600, 1_600, 10, 4, 3
CONFIG: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "num_mel_bins": 6,
    "d_model": 20,
    "encoder_layers": 2,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 28,
    "max_source_positions": FRAMES,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
NAMES: dict[str, dict[str, Any]] = {
    "english": {},
    "multilingual": {"scale_embedding": True, "activation_function": "relu"},
}
SUPPRESSED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "english": ((), ()),
    "multilingual": ((6, 12, 21, 30), (2, 14, 25)),
}
"""Tokens that replies don't contain, and that they don't begin with."""
STARTS = {"english": (3,), "multilingual": (3, 8, 9, 10)}
RECORDS = [
    {"file": f"{n}.wav", "other": f"{(n + 1) % 4}.wav", "n": n + 1, "m": 9 - n} for n in range(4)
]
BLOCK = """
prompts ask {
  rows "data.jsonl"
  audio a = "{file}"
  template "{a}"
  answer " {n}"
  wrong " {m}"
  corrupt changed { file = other }
}
"""


def written(number: int) -> np.ndarray:
    """The 16-bit samples [sample, channel] of a file; the second one has two channels."""
    random, count = np.random.default_rng(number), (700, 1_000, 1_300, SECOND)[number]
    time = np.arange(count)[:, None] / RATE
    waves = np.sin(2 * np.pi * (90 * (number + 1) + 70 * number * time) * time)
    noise = random.normal(0, 0.05, (count, 2 if number == 1 else 1))
    return np.round((0.4 * waves + noise) * 20_000).astype("<i2")


def write_wave(path: Path, samples: np.ndarray, rate: int = RATE, width: int = 2) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


def write_data(folder: Path) -> None:
    for number in range(len(RECORDS)):
        write_wave(folder / f"{number}.wav", written(number))
    text = "\n".join(map(json.dumps, RECORDS)) + "\n"
    (folder / "data.jsonl").write_text(text, encoding="utf-8")


@cache
def folder() -> Path:
    from tempfile import mkdtemp

    made = Path(mkdtemp(prefix="mechdsl-sounds-"))
    write_data(made)
    return made


@cache
def extractor(**changes: Any) -> WhisperFeatureExtractor:
    sizes: dict[str, Any] = {"feature_size": 6, "sampling_rate": RATE, "hop_length": 80}
    return WhisperFeatureExtractor(**{**sizes, "n_fft": 256, "chunk_length": 1, **changes})


@cache
def processor() -> WhisperProcessor:
    return WhisperProcessor(extractor(), models.tokenizer())


@cache
def bare(name: str) -> Any:
    torch.manual_seed(0)
    made: Any = WhisperForConditionalGeneration(WhisperConfig(**CONFIG, **NAMES[name]))
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.7 if name == "multilingual" else 0.3)
    if name == "multilingual":
        made.generation_config.lang_to_id = {"<|de|>": 7, "<|en|>": 8}
        made.generation_config.task_to_id = {"transcribe": 9, "translate": 11}
        made.generation_config.no_timestamps_token_id = 10
        never, first = map(list, SUPPRESSED[name])
        made.generation_config.suppress_tokens = never
        made.generation_config.begin_suppress_tokens = first
    return unchanged(made.eval())


@cache
def loaded(name: str) -> LoadedModel:
    model, found = adopt_model("m", bare(name), processor())
    assert model is not None, found
    return model


@cache
def features(number: int) -> Tensor:
    samples = written(number).astype(np.float64).mean(1) / 32_768
    return extractor()(samples, sampling_rate=RATE, return_tensors="pt")["input_features"]


@torch.no_grad()
def outputs(
    name: str,
    sound: int | Tensor,
    writes: Iterable[Write] = (),
    text: Sequence[int] = (),
    **more: Any,
) -> Any:
    own = features(sound) if isinstance(sound, int) else sound
    with changed(bare(name), writes):
        ids = torch.tensor([[*STARTS[name], *text]])
        return bare(name)(decoder_input_ids=ids, input_features=own, use_cache=False, **more)


def token(word: str) -> int:
    return models.tokenizer().get_vocab()[word]


def difference(name: str, n: int, sound: int | Tensor, writes: Iterable[Write] = ()) -> float:
    logits = outputs(name, sound, writes).logits[0, -1]
    answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
    return float(logits[answer] - logits[wrong])


def other(n: int) -> int:
    return (n + 1) % len(RECORDS)


def place(site: str, layer: int) -> Place:
    component, _, stack = site.partition(" ")
    block = f"model.{'encoder' if stack == 'encoder' else 'decoder'}.layers.{layer}"
    attention = f"{block}.{'encoder_attn' if stack == 'cross' else 'self_attn'}"
    match component:
        case "resid_post":
            return Place(block)
        case "mlp_out":
            return Place(f"{block}.fc2")
        case "z":
            return Place(f"{attention}.out_proj", of_input=True)
        case "attn_out":
            return Place(attention)
        case _:
            return Place(f"{attention}.{component}_proj")


def read(name: str, sound: int | Tensor, own: Place) -> Tensor:
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value.clone())
        return value

    decodes = "decoder" in own.path and "encoder_attn" not in own.path
    count = len(STARTS[name]) if decodes else FRAMES
    outputs(name, sound, [(own, list(range(count)), keep)])
    return found[0]


def copied(name: str, n: int, own: Place, tokens: Sequence[int]) -> Write:
    vectors = read(name, n, own)[list(tokens)]
    return own, tokens, lambda _: vectors


def by_head(name: str, n: int, site: str, layer: int, head: int, tokens: Sequence[int]) -> Write:
    """Copy one head; a place of the encoder has all its heads side by side."""
    own, width = place(site, layer), {"cross": 5, "encoder": 10}[site.partition(" ")[2]]
    columns = slice(head * width, (head + 1) * width)
    return copied_columns(own, tokens, columns, read(name, n, own))


RULES = (
    "patch resid_post encoder layer * at a frame 3 token",
    "ablate attn_out encoder layer * at a frame 2..4 tokens with zero",
    "patch z encoder layer 0 head * at a tokens",
    "patch v cross layer * head * at a frame * tokens",
    "ablate attn_out cross layer 1 at last token with zero",
    "patch resid_post layer 0 at last token",
    "scale mlp_out encoder layer 0 at a frame 2 token by 2\n"
    "  patch k cross layer 2 heads * at a frame 2 token",
)


def in_order(name: str, n: int) -> list[list[Write]]:
    """The writes of each cell of `RULES`, one rule after another."""
    every, last = range(FRAMES), [len(STARTS[name]) - 1]
    doubled = place("mlp_out encoder", 0), [1], lambda value: 2 * value
    return [
        *([copied(name, n, place("resid_post encoder", layer), [2])] for layer in range(2)),
        *([zeroed(place("attn_out encoder", layer), [1, 2, 3])] for layer in range(2)),
        *([by_head(name, n, "z encoder", 0, head, every)] for head in range(2)),
        *(
            [by_head(name, n, "v cross", layer, head, every)]
            for layer in range(LAYERS)
            for head in range(HEADS)
        ),
        [zeroed(place("attn_out cross", 1), last)],
        [copied(name, n, place("resid_post", 0), last)],
        [doubled, copied(name, n, place("k cross", 2), [1])],
    ]


def try_text(
    text: str, model: LoadedModel, mode: str = "planned", block: str = BLOCK
) -> tuple[FileResult | None, list[Diagnostic]]:
    whole = f'mech 1\nmodel m = local("handed over")\n{block}\n{text}'
    return run_on(Source(whole, folder() / "file.mech"), {"m": model}, MODES[mode])


def run_text(
    text: str, name: str, mode: str = "planned", block: str = BLOCK
) -> list[ExperimentResult]:
    return [*succeeded(*try_text(text, loaded(name), mode, block)).values()]


def codes(found: Iterable[Diagnostic]) -> list[str]:
    return [each.code for each in found if each.severity == "error"]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("multilingual", "planned"),
        pytest.param("english", "planned", marks=pytest.mark.slow),
        pytest.param("english", "small passes", marks=pytest.mark.slow),
    ],
)
def test_rules_on_sounds_equal_hooks_on_the_bare_model(name: str, mode: str) -> None:
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(RULES)
    )
    found = run_text(text, name, mode)
    everything = [in_order(name, n) for n in range(len(RECORDS))]
    base = [difference(name, n, other(n)) for n in range(len(RECORDS))]
    expected = [
        [difference(name, n, other(n), writes) for n, writes in enumerate(cell)]
        for cell in zip(*everything, strict=True)
    ]
    check_rules(found, RULES, base, expected)


def test_allowed_keys_of_decoder_tokens_equal_a_mask_on_the_bare_model() -> None:
    """With a rule in the encoder, in two experiments; the decoder begins with four tokens."""
    name, count = "multilingual", len(STARTS["multilingual"])
    rule = "allow attention layer * heads * from first token to last token"
    removed = "ablate resid_post encoder layer 0 at a frame 3 token with zero"
    texts = experiment("e", rule) + experiment("f", rule, removed)
    found = run_text(texts, name)
    writes: list[list[Write]] = [[], [zeroed(place("resid_post encoder", 0), [2])]]
    for each, more in zip(found, writes, strict=True):
        expected: list[list[float]] = []
        for layer in range(LAYERS):
            attention = bare(name).get_submodule(f"model.decoder.layers.{layer}.self_attn")
            with first_query_sees_last(attention, count):
                expected.append([difference(name, n, n, more) for n in range(len(RECORDS))])
        measure = each.measures[0]
        np.testing.assert_allclose(measure.patched, expected, atol=2e-4)
        assert np.abs(np.array(expected) - measure.base).max() > 0.01


@contextmanager
def first_query_sees_last(attention: Any, count: int) -> Generator[None]:
    """While it is open, the first token of a decoder sees the last one."""

    def show(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = torch.full((1, 1, count, count), torch.finfo(torch.float32).min).triu(1)
        mask[..., 0, count - 1] = 0
        return args, {**kwargs, "attention_mask": mask}

    handle = attention.register_forward_pre_hook(show, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_replies_and_long_answers_to_sounds_equal_hooks_on_the_bare_model() -> None:
    """In two experiments, with answers of two tokens and of one."""
    rule = "ablate resid_post encoder layer 0 at a frame 1..5 tokens with zero"
    block = BLOCK.replace(
        'answer " {n}"', 'shown = if n < 3 then "circle" else "red dots"\n  answer " {shown}"'
    ).replace('  wrong " {m}"\n', "")
    texts = experiment("r", "generate 4", rule, measure='measure matches("1|2|3") as raw')
    texts += experiment("s", rule, measure="measure logprob(answer) as delta")
    for name in NAMES:
        never, at_first = SUPPRESSED[name]
        writes = [zeroed(place("resid_post encoder", 0), range(5))]
        replies, sums = run_text(texts, name, block=block)
        assert replies.replies is not None
        for n in range(len(RECORDS)):
            [reply], [cell] = replies.replies.runs["clean"][n], replies.replies.cells[0][n]
            assert list(reply.ids) == replied(name, n, ())
            assert not {*reply.ids} & {*never}
            assert reply.ids[0] not in at_first
            assert list(cell.ids) == replied(name, n, writes)
            ids = [token(word) for word in (["circle"] if n < 2 else ["red", "dots"])]
            logits = outputs(name, n, writes, ids[:-1]).logits[0].log_softmax(-1)
            first = len(STARTS[name]) - 1
            total = sum(float(logits[first + at, each]) for at, each in enumerate(ids))
            np.testing.assert_allclose(sums.measures[0].patched[0, n], total, atol=2e-4)
        assert np.abs(sums.measures[0].patched - sums.measures[0].base).max() > 0.1
        said = ", without the tokens of `suppress_tokens`, `begin_suppress_tokens` in its gener"
        assert (said in replies.conventions["generate"]) == bool(never)


def replied(name: str, n: int, writes: Iterable[Write]) -> list[int]:
    """The most likely tokens before the end of the text, without suppressed ones."""
    found: list[int] = []
    never, first = SUPPRESSED[name]
    for step in range(4):
        logits = outputs(name, n, writes, found).logits[0, -1].clone()
        logits[[*never, *(first if step == 0 else ())]] = -torch.inf
        best = int(logits.argmax())
        if best == CONFIG["eos_token_id"]:
            break
        found.append(best)
    return found


def test_observed_and_blocked_attention_to_frames_equal_the_bare_model() -> None:
    name, keys, to = "multilingual", [1, 2, 3], "from last token to a frame 2..4 tokens"
    text = experiment("c", f"observe attention cross layer * head * {to}", measure="")
    text += experiment("b", f"block attention cross layer 1 heads * {to}")
    cross, blocked = run_text(text, name)
    bare(name).set_attn_implementation("eager")
    try:
        for n in range(len(RECORDS)):
            seen = outputs(name, n, output_attentions=True)
            weights = torch.cat([each[0, :, -1, keys].sum(-1) for each in seen.cross_attentions])
            np.testing.assert_allclose(cross.measures[0].patched[:, n], weights, atol=1e-5)
            value = difference_without(name, n, keys)
            np.testing.assert_allclose(blocked.measures[0].patched[0, n], value, atol=2e-4)
    finally:
        bare(name).set_attn_implementation("sdpa")


def test_patterns_over_frames_equal_the_bare_model() -> None:
    name, (width, wide) = "multilingual", (5, 10)
    cases: dict[str, dict[str, str]] = {
        "observe entropy pattern encoder layer * head * at a frame 2 token": {"measure": ""},
        "observe entropy pattern cross layer * head * at last token": {"measure": ""},
        "ablate pattern encoder layer 1 head 0 at a frame 2 token with zero": {},
        "ablate pattern cross layer 2 head 1 at last token with zero": {},
    }
    text = "".join(
        experiment(f"e{n}", line, **given) for n, (line, given) in enumerate(cases.items())
    )
    found = [each.measures[0].patched for each in run_text(text, name)]
    last = len(STARTS[name]) - 1
    bare(name).set_attn_implementation("eager")
    try:
        for n in range(len(RECORDS)):
            seen = outputs(name, n, output_attentions=True)
            for own, weights, query in (
                (found[0], seen.encoder_attentions, 1),
                (found[1], seen.cross_attentions, last),
            ):
                entropy = torch.cat(
                    [torch.special.entr(each[0, :, query]).sum(-1) for each in weights]
                )
                np.testing.assert_allclose(own[:, n], entropy, atol=1e-4)
    finally:
        bare(name).set_attn_implementation("sdpa")
    for values, site, layer, head, token_, size in (
        (found[2], "z encoder", 1, 0, 1, wide),
        (found[3], "z cross", 2, 1, last, width),
    ):
        columns = slice(head * size, (head + 1) * size)
        for n in range(len(RECORDS)):
            write = copied_columns(place(site, layer), [token_], columns, torch.zeros(FRAMES, 20))
            np.testing.assert_allclose(values[0, n], difference(name, n, n, [write]), atol=2e-4)


def test_estimates_of_frames_equal_autograd() -> None:
    name, site = "multilingual", "resid_post encoder"
    text = experiment(
        "e", "from clean into changed", f"patch {site} layer * at a frame 3 token",
        "using gradient_input",
    )  # fmt: skip
    [found] = run_text(text, name)
    module, expected = bare(name), list[list[float]]()
    for layer in range(2):
        row, own = list[float](), place(site, layer)
        for n in range(len(RECORDS)):
            old, new = read(name, other(n), own)[2], read(name, n, own)[2]
            leaf = old.clone().requires_grad_()
            write = own, [2], lambda _, leaf=leaf: leaf[None]
            with torch.enable_grad(), changed(module, [write]):
                ids = torch.tensor([STARTS[name]])
                given = {"input_features": features(other(n)), "use_cache": False}
                logits = module(decoder_input_ids=ids, **given).logits[0, -1]
            answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
            (slope,) = torch.autograd.grad(logits[answer] - logits[wrong], leaf)
            row.append(float(((new - old) * slope).sum()))
        expected.append(row)
    measure = found.measures[0]
    np.testing.assert_allclose(measure.patched - measure.base, expected, atol=2e-4)


def difference_without(name: str, n: int, keys: Sequence[int]) -> float:
    """The measure while the last token's cross attention of the middle layer skips some frames."""
    attention = bare(name).get_submodule("model.decoder.layers.1.encoder_attn")
    with last_query_without(attention, len(STARTS[name]), FRAMES, keys):
        return difference(name, n, n)


def test_silence_and_noise_corruptions_of_sounds_equal_reference() -> None:
    """Silence has only zeros. Noise has the standard deviation of the line and is drawn for each
    file; both keep the length."""
    block = BLOCK.replace(
        "corrupt changed",
        "corrupt hushed { silence a }\n  corrupt noisy { noise a by 51 }\n  corrupt changed",
    )
    rule = "patch resid_post encoder layer 1 at a frame 3 token"
    text = experiment("h", "from hushed into clean", rule)
    text += experiment("y", "from noisy into clean", rule)
    hushed, noisy = run_text(text, "english", block=block)
    quiet = extractor()(np.zeros(SECOND), sampling_rate=RATE, return_tensors="pt")["input_features"]
    own = place("resid_post encoder", 1)
    for n in range(len(RECORDS)):
        vectors = read("english", quiet, own)[[2]]
        expected = difference("english", n, n, [(own, [2], lambda _, own=vectors: own)])
        np.testing.assert_allclose(hushed.measures[0].patched[0, n], expected, atol=1e-4)
    assert hushed.conventions["sound of hushed"] == "silence"
    assert np.abs(noisy.measures[0].patched - noisy.measures[0].base).max() > 0.01
    assert noisy.conventions["sound of noisy"] == "noise of standard deviation 51 of 255"


def test_noise_on_a_sound_has_the_standard_deviation_of_the_line() -> None:
    path = folder() / "3.wav"
    digest, size = inspect_sound(path)
    plain = Sound("file", path=path, digest=digest, size=size)
    noisy = [
        render_samples(replace(plain, changes=(PictureChange("noise", 51, seed=seed),)))
        for seed in (1, 1, 2)
    ]
    np.testing.assert_allclose((noisy[0] - render_samples(plain)).std(), 0.2, atol=0.02)
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert (noisy[0] != noisy[2]).mean() > 0.9


def test_generated_sounds_equal_their_formulas() -> None:
    size = RATE, SECOND
    tone = render_samples(Sound("tone", number=200, size=size))
    expected = 0.5 * np.sin(2 * np.pi * 200 * np.arange(SECOND) / RATE)
    np.testing.assert_allclose(tone, expected, atol=1e-6)
    assert not render_samples(Sound("silence", size=size)).any()
    first, second = (render_samples(Sound("noise", seed=seed, size=size)) for seed in (1, 2))
    assert 0.4 < np.abs(first).max() <= 0.5
    assert (first != second).mean() > 0.9
    assert {*GENERATED_SOUNDS} == {"silence", "noise", "tone"}


def test_generated_sounds_in_prompts_equal_the_bare_model() -> None:
    """Each row has a different tone; the two experiments of a file share them."""
    block = BLOCK.replace('"{file}"', "tone(100 * n)").replace("file = other", "n = other(n)")
    rule = "ablate mlp_out encoder layer 1 at a frame 3..5 tokens with zero"
    found = run_text(experiment("e", rule) + experiment("f", rule), "english", block=block)
    for n in range(len(RECORDS)):
        tone = 0.5 * np.sin(2 * np.pi * 100 * (n + 1) * np.arange(SECOND) / RATE)
        own = extractor()(tone, sampling_rate=RATE, return_tensors="pt")["input_features"]
        writes = [zeroed(place("mlp_out encoder", 1), [2, 3, 4])]
        for each in found:
            np.testing.assert_allclose(
                [each.measures[0].base[0, n], each.measures[0].patched[0, n]],
                [difference("english", n, own), difference("english", n, own, writes)],
                atol=2e-4,
            )


@pytest.mark.slow
def test_model_in_a_folder_equals_the_one_passed_from_python(tmp_path: Path) -> None:
    """Language, task and time stamps come from `generation_config.json`."""
    bare("multilingual").save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    write_data(tmp_path)
    text = experiment("e", "from clean into changed", RULES[0])
    [expected] = run_text(text, "multilingual")
    whole = f'mech 1\nmodel m = local("model")\n{BLOCK}\n{text}'
    found = succeeded(*run_source(Source(whole, tmp_path / "file.mech")))["e"]
    np.testing.assert_allclose(found.measures[0].patched, expected.measures[0].patched, atol=1e-6)


def test_decoder_of_another_language_begins_with_its_token() -> None:
    made = deepcopy(bare("multilingual"))
    made.generation_config.language, made.generation_config.task = "de", "translate"
    model, found = adopt_model("m", made, processor())
    assert model is not None, found
    assert model.shape.starts == (3, 7, 11, 10)


ZERO = "ablate resid_post encoder layer 0 at a tokens with zero"
LINE = 'audio a = "{file}"'
ERRORS = {
    (ZERO, 'template "{a}"', 'template "say {a}"'): "E0459",
    (ZERO, LINE, f'{LINE}\n  audio b = silence\n  template "{{a}} {{b}}"'): "E0459",
    (ZERO, LINE, "audio a = tune(440)"): "E0203",
    (ZERO, LINE, "audio a = tone"): "E0207",
    (ZERO, LINE, "audio a = tone(0)"): "E0207",
    (ZERO, LINE, "audio a = silence(3)"): "E0207",
    (ZERO, LINE, "audio a = 3"): "E0207",
    (ZERO, LINE, "audoi a = silence"): "E0102",
    (ZERO, LINE, 'audio a = "none.wav"'): "E0560",
    (ZERO, LINE, 'audio a = "data.jsonl"'): "E0560",
    (ZERO, LINE, "image a = gray"): "E0455",
    (ZERO, "file = other", "mask a"): "E0207",
    (ZERO, "file = other", "silence b"): "E0203",
    ("patch resid_post encoder layer 0 at a frame 11 token", "", ""): "E0310",
    ("patch resid_post encoder layer 0 at a tile 1 token", "", ""): "E0310",
    ("patch resid_post encoder layer 0 at a fram 1 token", "", ""): "E0101",
    ("patch resid_post layer 0 at a frame 1 token", "", ""): "E0316",
    ("patch resid_post vision layer 0 at last token", "", ""): "E0108",
}


@pytest.mark.parametrize(("case", "code"), ERRORS.items())
def test_invalid_sound_reports_the_code_before_anything_runs(
    case: tuple[str, str, str], code: str
) -> None:
    line, old, new = case
    text = experiment("e", "from clean into changed", line)
    block = BLOCK.replace(old, new)
    if "audio b" in new:
        block = block.replace('template "{a}"', "")
    found = codes(try_text(text, loaded("english"), block=block)[1])
    assert code in found[:2]


def test_sound_of_another_rate_or_length_reports_e0459(tmp_path: Path) -> None:
    hints = {"low": "ffmpeg -i in.wav -ar 1600 out.wav", "long": "cut the sound"}
    write_wave(folder() / "low.wav", written(0), rate=800)
    write_wave(folder() / "long.wav", np.zeros((SECOND + 1, 1), "<i2"))
    for name, hint in hints.items():
        block = BLOCK.replace('"{file}"', f'"{name}.wav"')
        [problem] = try_text(experiment("e", ZERO), loaded("english"), block=block)[1]
        assert problem.code == "E0459"
        assert isinstance(problem, UnpreparedImages)
        assert hint in problem.hint


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"RIFF", "a WAV file"),
        (b"RIFF\xff\xff\xff\xffWAVEfmt \x10\x00\x00\x00\x03\x00", "a WAV file"),
        ("8 bits", "8 bits, not 16"),
        ("cut", "shorter than its header says"),
        ("empty", "no samples"),
        ("large", "more than"),
    ],
)
def test_hostile_sound_file_reports_its_problem(
    content: bytes | str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechdsl.images.picture import MediaError

    path, samples = tmp_path / "a.wav", written(0)
    write_wave(
        path, samples[:0] if content == "empty" else samples, width=1 + (content != "8 bits")
    )
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif content == "large":
        monkeypatch.setattr(limits, "AUDIO_FILE", path.stat().st_size - 1)
    with pytest.raises(MediaError, match=reason):
        inspect_sound(path)


def test_stereo_file_gives_the_mean_of_its_channels() -> None:
    digest, size = inspect_sound(folder() / "1.wav")
    assert size == (RATE, 1_000)
    found = render_samples(Sound("file", path=folder() / "1.wav", digest=digest, size=size))
    np.testing.assert_allclose(found, written(1).mean(1) / 32_768, atol=1e-7)


def test_block_of_texts_reports_e0455() -> None:
    block = 'prompts ask {\n  x in ["1", "2"]\n  template "{x}"\n  answer " 3"\n  wrong " 4"\n}\n'
    text = experiment("e", "ablate mlp_out layer 0 at last token with zero")
    assert codes(try_text(text, loaded("english"), block=block)[1]) == ["E0455"]


def test_sound_for_a_model_of_texts_reports_e0455() -> None:
    whole = f'mech 1\nmodel m = zoo("counting")\n{BLOCK}\n{experiment("e", ZERO)}'
    assert codes(check_source(Source(whole, folder() / "file.mech")).diagnostics)[0] == "E0455"


@pytest.mark.parametrize("change", [{"chunk_length": 2}, {"feature_size": 8}, {"dither": 0.1}])
def test_extractor_of_other_features_reports_e0459(change: dict[str, Any]) -> None:
    own = WhisperProcessor(extractor(**change), models.tokenizer())
    model, found = adopt_model("m", bare("english"), own)
    assert model is not None, found
    assert codes(try_text(experiment("e", ZERO), model)[1]) == ["E0459"]


def test_extractor_without_a_tokenizer_reports_e0412() -> None:
    assert codes(adopt_model("m", bare("english"), extractor())[1]) == ["E0412"]
    pair = extractor(), models.tokenizer()
    assert codes(adopt_model("m", bare("english"), pair)[1]) == ["E0412"]


def test_conventions_describe_sounds_and_decoder_start_tokens() -> None:
    [found] = run_text(experiment("e", ZERO), "multilingual")
    said = found.conventions
    assert said["sound `a`"].startswith(
        "prepared by the model's `WhisperFeatureExtractor`; 10 frames"
    )
    assert said["decoder"] == "begins with `<unk>` `are` `there` `?`; the encoder reads the sound"


def test_sound_token_ids_depend_on_content_and_extractor() -> None:
    """Token ids are part of the store keys."""
    reader = loaded("english").tokenizer
    assert isinstance(reader, ImagePromptTokenizer)
    digests = [inspect_sound(folder() / f"{n}.wav")[0] for n in (0, 1)]
    sounds = [
        *(Sound("file", digest=digest, said="a.wav", size=(RATE, 700)) for digest in digests),
        *(Sound("tone", number=number) for number in (1, 2)),
        *(Sound("noise", seed=seed) for seed in (1, 2)),
    ]
    assert len({reader.encode(each.marker).ids for each in sounds}) == len(sounds)
    other = WhisperProcessor(extractor(n_fft=200), models.tokenizer())
    assert reader.with_processor(other, bare("english").config).hash != reader.hash


def test_model_identity_depends_on_suppressed_tokens() -> None:
    model = replace(loaded("multilingual"), module=deepcopy(bare("multilingual")))
    found: set[str | None] = {compute_identity(model)}
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        setattr(model.module.generation_config, name, [6])
        found.add(compute_identity(model))
    assert len(found - {None}) == 3


def formatted(text: str) -> str:
    tree, found = parse(Source(text))
    assert tree is not None, found
    return format_file(tree)


def test_formatted_lines_of_sounds_parse_to_the_same_text() -> None:
    text = f'mech 1\n\nmodel m = local("x")\n{BLOCK}\n{experiment("e", RULES[1])}'
    once = formatted(text)
    assert 'audio a = "{file}"' in once
    assert "a frame 2..4 tokens" in once
    assert formatted(once) == once


def test_frames_of_a_missing_model_are_no_error() -> None:
    rules = ("a frame 3 token", "a frame 900 token", "a frame 2..4 tokens", "each token of a")
    text = "".join(
        experiment(f"e{n}", f"ablate mlp_out encoder layer 0 at {at} with zero")
        for n, at in enumerate(rules)
    )
    whole = f'mech 1\nmodel m = local("none")\n{BLOCK}\n{text}'
    assert not codes(check_source(Source(whole, folder() / "file.mech")).diagnostics)
