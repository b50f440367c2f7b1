"""Position ids that rules change in encoder-decoders, against the bare model with these position
ids: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ..image_prompts import test_sounds as sounds
from ..image_prompts.support import experiment as of_sounds
from .encoder_decoders import (
    Place,
    Text,
    Write,
    changed,
    difference,
    model,
    place,
    run,
    starts,
    text,
    tokenizer,
    zeroed,
)
from .support import DIFFERENCE, MODES, PROMPTS, ROWS, Array, Record, experiment, token, try_file
from .test_encoder_decoder_replies import record_logits

Ids = Mapping[int, int]
"""Token → its position id."""
Renumber = Callable[[Text], tuple[Ids, Ids]]
"""The changed position ids of the encoder and of the decoder."""


def numbered(count: int, changed: Ids) -> torch.Tensor:
    """Count tokens from 0, except changed ones."""
    return torch.tensor([[changed.get(at, at) for at in range(count)]])


def counted(tokens: Sequence[int], first: int) -> dict[int, int]:
    return {at: first + n for n, at in enumerate(tokens)}


@torch.no_grad()
def logits(
    family: str,
    of: Text,
    ids: tuple[Ids, Ids],
    writes: Sequence[Write] = (),
    more: Sequence[int] = (),
) -> Array:
    """[token of the decoder, vocab]; `more` follows the decoder's first tokens."""
    own = torch.tensor([[*starts(family), *more]])
    with changed(model(family), writes):
        found = model(family)(
            input_ids=torch.tensor([of.ids]),
            position_ids=numbered(len(of.ids), ids[0]),
            decoder_input_ids=own,
            decoder_attention_mask=torch.ones_like(own),
            decoder_position_ids=numbered(own.shape[1], ids[1]),
            use_cache=False,
        )
    return found.logits[0].double().numpy()


PLAIN: tuple[Ids, Ids] = {}, {}
SUBJECT_ZEROED = "ablate resid_post encoder layer 0 at subject tokens with zero"


def in_turn(*parts: tuple[Sequence[int], int]) -> tuple[Ids, Ids]:
    """Position ids of the encoder; later ones replace earlier ones."""
    return {at: to for own, first in parts for at, to in counted(own, first).items()}, {}


CASES: dict[str, Renumber] = {
    "renumber item tokens from 20": lambda of: in_turn((of.items, 20)),
    "renumber subject tokens from 0": lambda of: in_turn((of.subject, 0)),
    "renumber {item tokens, subject tokens} from 9": lambda of: in_turn(
        ((*of.items, *of.subject), 9)
    ),
    "renumber item tokens from 20 renumber subject tokens from 3": lambda of: in_turn(
        (of.items, 20), (of.subject, 3)
    ),
    "renumber item tokens from 12 renumber last token from 7": lambda of: (
        counted(of.items, 12),
        {0: 7},
    ),
}


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("t5gemma", "planned"),
        *(pytest.param("t5gemma writing", mode, marks=pytest.mark.slow) for mode in MODES),
    ],
)
def test_renumbered_tokens_of_an_encoder_equal_position_ids_of_the_bare_model(
    family: str, mode: str, tmp_path: Path
) -> None:
    """Alone and with a vector of 0, in one file."""
    rules = [*((rule, "") for rule in CASES), (next(iter(CASES)), SUBJECT_ZEROED)]
    lines = "".join(
        experiment(
            f"e{n}",
            "prompts p",
            *rule.replace(" renumber", "\nrenumber").split("\n"),
            more,
            DIFFERENCE,
        )
        for n, (rule, more) in enumerate(rules)
    )
    found = run(family, lines, tmp_path, MODES[mode])
    for n, (rule, more) in enumerate(rules):
        expected = list[float]()
        for record in ROWS:
            of = text(record)
            writes = [zeroed(place(family, "resid_post encoder", 0), of.subject)] if more else []
            values = logits(family, of, CASES[rule](of), writes)
            expected.append(difference(values, record))
        measure = found[f"e{n}"].measures[0]
        base = [difference(logits(family, text(record), PLAIN), record) for record in ROWS]
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        np.testing.assert_allclose(measure.patched[0], expected, atol=1e-4, err_msg=rule)
        assert np.abs(np.array(expected) - base).max() > 0.05, rule


def total(record: Record, ids: tuple[Ids, Ids]) -> float:
    """The log-probability of an answer of two tokens."""
    answer = [token(record["a"]), token(record["b"])]
    found = logits("t5gemma writing", text(record), ids, more=answer[:1])
    values = torch.from_numpy(found).log_softmax(-1)
    return float(values[0, answer[0]] + values[1, answer[1]])


def test_renumbered_start_of_a_decoder_acts_on_longer_answers(tmp_path: Path) -> None:
    """The answer's first token keeps its position id and attends to the start token."""
    family = "t5gemma writing"
    rules = {
        "renumber last token from 6": {0: 6},
        "renumber tokens * from 5": {0: 5},
        "for k in [4, 11] { renumber last token from k }": {0: 4},
    }
    block = PROMPTS.replace('answer " {a}"', 'answer " {a} {b}"').replace('  wrong " {b}"\n', "")
    lines = "".join(
        experiment(f"e{n}", "prompts p", rule, "measure logprob(answer) as delta")
        for n, rule in enumerate(rules)
    )
    found = [*run(family, lines, tmp_path, prompts=block).values()]
    changes = [[0.0] * len(ROWS) for _ in range(4)]
    cells = [(0, 0, 6), (1, 0, 5), (2, 0, 4), (2, 1, 11)]
    for at, (number, cell, first) in enumerate(cells):
        for n, record in enumerate(ROWS):
            of = text(record)
            encoded = counted(range(len(of.ids)), 5) if number == 1 else {}
            measure = found[number].measures[0]
            expected = total(record, (encoded, {0: first}))
            np.testing.assert_allclose(measure.patched[cell, n], expected, atol=1e-4)
            changes[at][n] = abs(expected - total(record, PLAIN))
    assert min(map(max, changes)) > 0.02


def test_run_with_renumbered_tokens_of_an_encoder_is_a_source(tmp_path: Path) -> None:
    """Two such runs in one file have different values."""
    family = "t5gemma"
    rule = "patch resid_post encoder layer 1 at subject tokens"
    lines = "".join(
        experiment(
            f"e{first}",
            "prompts p",
            "from moved into clean",
            f"run moved {{ renumber item tokens from {first} }}",
            rule,
            DIFFERENCE,
        )
        for first in (20, 31)
    )
    found = run(family, lines, tmp_path)
    own = place(family, "resid_post encoder", 1)
    for first in (20, 31):
        for n, record in enumerate(ROWS):
            of, kept = text(record), list[torch.Tensor]()
            every = list(range(len(of.ids)))

            def keep(value: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
                kept.append(value.clone())
                return value

            logits(family, of, (counted(of.items, first), {}), [(own, every, keep)])
            vectors = kept[0][list(of.subject)]
            written = own, of.subject, lambda _, vectors=vectors: vectors
            expected = difference(logits(family, of, PLAIN, [written]), record)
            measure = found[f"e{first}"].measures[0]
            np.testing.assert_allclose(measure.patched[0, n], expected, atol=1e-4)
    values = [found[f"e{first}"].measures[0] for first in (20, 31)]
    assert np.abs(values[0].patched - values[0].base).max() > 0.05
    assert np.abs(values[0].patched - values[1].patched).max() > 0.02


REPLIES: dict[str, Renumber] = {
    "renumber item tokens from 20": lambda of: (counted(of.items, 20), {}),
    "renumber last token from 9 during prefill": lambda of: ({}, {0: 9}),
    "renumber item tokens from 12\n  renumber last token from 8 during prefill": lambda of: (
        counted(of.items, 12),
        {0: 8},
    ),
}


def test_replies_after_renumbered_tokens_equal_the_bare_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of the reply keep their position ids."""
    steps = record_logits(monkeypatch)
    family = "t5gemma writing"
    rules = [*REPLIES, "renumber item tokens from 20\n  " + SUBJECT_ZEROED]
    lines = "".join(
        experiment(f"e{n}", "prompts p", "generate 4", rule, "measure length as raw")
        for n, rule in enumerate(rules)
    )
    found = run(family, lines, tmp_path)
    for n, rule in enumerate(rules):
        changes = list[float]()
        for row, record in enumerate(ROWS):
            of, reply = text(record), list[int]()
            is_zeroed = SUBJECT_ZEROED in rule
            own = place(family, "resid_post encoder", 0)
            writes = [zeroed(own, of.subject)] if is_zeroed else []
            for step in range(4):
                ids = REPLIES[rule.removesuffix("\n  " + SUBJECT_ZEROED)](of)
                values = logits(family, of, ids, writes, reply)[-1]
                assert min(np.abs(each - values).max() for each in steps[step]) < 2e-4
                plain = logits(family, of, PLAIN, writes, reply)[-1]
                changes.append(float(np.abs(values - plain).max()))
                if int(values.argmax()) == model(family).config.eos_token_id:
                    break
                reply.append(int(values.argmax()))
            assert [*found[f"e{n}"].replies.cells[0][row][0].ids] == reply, rule
        assert max(changes) > 0.1, rule


def whisper(name: str, n: int, first: Ids, more: Sequence[int] = (), zero: bool = False) -> Array:
    """[token of the decoder, vocab] of Whisper with position ids of its decoder."""
    own = Place("model.encoder.layers.0")
    writes = [zeroed(own, [2])] if zero else []
    ids = numbered(len(sounds.STARTS[name]) + len(more), first)
    # Without a mask, the library treats a jump of position ids as the start of another text.
    given = {"decoder_position_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
    found = sounds.outputs(name, n, writes, more, **given)
    return found.logits[0].detach().double().numpy()


SOUNDS: dict[str, Ids] = {
    "renumber last token from 12": {3: 12},
    "renumber tokens * from 20": {at: 20 + at for at in range(4)},
    "renumber tokens 0..1 from 7": {0: 7, 1: 8},
    "renumber token 1 from 31": {1: 31},
}


@pytest.mark.parametrize("mode", ["planned", pytest.param("plain", marks=pytest.mark.slow)])
def test_renumbered_tokens_of_a_decoder_of_sounds_equal_the_bare_model(mode: str) -> None:
    name, zero = "multilingual", "ablate resid_post encoder layer 0 at a frame 3 token with zero"
    rules = [(rule, more) for rule in SOUNDS for more in ("", zero)]
    texts = "".join(of_sounds(f"e{n}", *lines) for n, lines in enumerate(rules))
    source = "run moved { renumber tokens * from 9 }"
    texts += of_sounds(
        "f", "from moved into clean", source, "patch resid_post layer 1 at last token"
    )
    *found, patched = sounds.run_text(texts, name, mode)
    for each, (rule, more) in zip(found, rules, strict=True):
        expected = list[float]()
        for n, record in enumerate(sounds.RECORDS):
            values = whisper(name, n, SOUNDS[rule], zero=bool(more))[-1]
            answer, wrong = (sounds.token(str(record[key])) for key in ("n", "m"))
            expected.append(values[answer] - values[wrong])
        measure = each.measures[0]
        np.testing.assert_allclose(measure.patched[0], expected, atol=1e-4, err_msg=rule)
        assert np.abs(measure.patched - measure.base).max() > 0.02, rule
    assert np.abs(patched.measures[0].patched - patched.measures[0].base).max() > 0.01


def test_replies_to_sounds_after_renumbered_tokens_equal_the_bare_model() -> None:
    name, rule = "english", "renumber last token from 14 during prefill"
    text = of_sounds("e", "generate 4", rule, measure='measure matches("1|2|3") as raw')
    [found] = sounds.run_text(text, name)
    assert found.replies is not None
    differ = False
    for n in range(len(sounds.RECORDS)):
        replies = list[list[int]]()
        for first in ({}, {0: 14}):
            reply = list[int]()
            for _ in range(4):
                best = int(whisper(name, n, first, reply)[-1].argmax())
                if best == sounds.CONFIG["eos_token_id"]:
                    break
                reply.append(best)
            replies.append(reply)
        assert [*found.replies.runs["clean"][n][0].ids] == replies[0]
        assert [*found.replies.cells[0][n][0].ids] == replies[1]
        differ |= replies[0] != replies[1]
    assert differ


@pytest.mark.parametrize(
    ("line", "code", "part"),
    [
        ("renumber a frame 3 token from 2", "E0316", "only for the tokens of its decoder"),
        ("renumber last token from 32", "E0207", "the last position is 31"),
        ("renumber tokens * from 29", "E0207", "counts 4 tokens from 29"),
    ],
)
def test_invalid_positions_of_sounds_report_the_reason(line: str, code: str, part: str) -> None:
    _, found = sounds.try_text(of_sounds("e", line), sounds.loaded("multilingual"))
    [problem] = [each for each in found if each.severity == "error"]
    assert problem.code == code
    assert part in problem.label_text


@pytest.mark.parametrize(
    ("family", "line", "code", "part"),
    [
        ("t5", "renumber item tokens from 5", "E0108", "that adds positions to scores"),
        ("bart", "renumber item tokens from 5", "E0108", "whose `forward` takes no position ids"),
        ("marian", "renumber last token from 5", "E0108", "`forward` takes no position ids"),
        ("t5gemma", "renumber {item tokens, last token} from 3", "E0108", "together with a part"),
        ("t5gemma", "renumber last token from 40", "E0207", "the last position is 39"),
        ("t5gemma", "renumber item tokens from 38", "E0207", "tokens from 38"),
    ],
)
def test_invalid_positions_of_texts_report_the_reason(
    family: str, line: str, code: str, part: str, tmp_path: Path
) -> None:
    lines = experiment("e", "prompts p", line, DIFFERENCE)
    _, found = try_file(lines, tmp_path, model(family), tokenizer=tokenizer())
    [problem] = [each for each in found if each.severity == "error"]
    assert problem.code == code
    assert part in f"{problem.message} {problem.label_text}"
