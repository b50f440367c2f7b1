"""`save` of several replies to a prompt: samples, and draws of noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..execute.support import PROMPTS
from ..quick import in_turn
from ..reference.forward import Write, forward
from ..reference.noise import keyed_by_number, noise
from .models import double
from .support import experiment, rows, tokens, try_file, write_data

NOISED = "corrupt noised { add gaussian(std: 0.7, samples: 2) to embed at subject tokens }"
BLOCKS = PROMPTS.replace("corrupt other", f"{NOISED}\n  corrupt other")
SAMPLES = 3


@pytest.mark.parametrize("run", ["clean", "noised"])
@pytest.mark.parametrize(
    ("name", "mode"), in_turn(["gpt2", "llama", "gpt_neox"], ["plain", "planned", "small passes"])
)
def test_saved_vectors_of_every_reply_equal_the_reference(
    run: str, name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors are read after the reply of their row, with the noise of its draw; replies equal
    those of the experiment."""
    keyed_by_number(monkeypatch)
    write_data(tmp_path)
    lines = (
        f"from {run} into clean",
        f'generate 4 with temperature 3, samples {SAMPLES} until " w3"',
        f'save resid_post layer * of {run} at subject tokens, each reply token to "x.safetensors"',
    )
    text = "seed 0\n" + experiment("e", *lines, measure="measure length as raw")
    result, found = try_file(text, tmp_path, name, mode, precise=True, blocks=BLOCKS)
    assert result is not None, found
    tensors = load_file(tmp_path / "x.safetensors")
    about = [json.loads(each) for each in (tmp_path / "x.jsonl").read_text().splitlines()]
    own = result.experiments[0].replies.runs[run]
    draws = 2 if run == "noised" else 1
    assert tensors.keys() >= {"sample", "draw"} if draws > 1 else "draw" not in tensors
    shown = [
        (row, draw, sample, own[row][draw * SAMPLES + sample])
        for row in dict.fromkeys(each["row"] for each in about)
        for draw in range(draws)
        for sample in range(SAMPLES)
    ]
    assert len(shown) == len(rows()) * draws * SAMPLES
    assert len({reply.ids for *_, reply in shown}) > len(shown) / 2  # they differ
    said = [(e["row"], e.get("draw", 0), e["sample"], e["reply"]) for e in about]
    assert said == [(*which, reply.text) for *which, reply in shown]
    wanted: list[tuple[int, ...]] = []
    vectors: list[torch.Tensor] = []
    for each, (row, draw, sample, reply) in zip(about, shown, strict=True):
        subject, prompt = tokens(rows()[row], "subject tokens"), rows()[row].ids
        assert each["ids"] == [*prompt, *reply.ids]
        added = [
            Write("embed", None, lambda now, key=(row, draw, at): _noised(now, *key), at)
            for at in (subject if run == "noised" else [])
        ]
        seen = forward(name, double(name), each["ids"], added)
        places = [(at, 0) for at in subject]
        places += [(len(prompt) + n, n + 1) for n in range(len(reply.ids))]
        for token, position in places:
            wanted.append((row, draw, sample, token, position))
            vectors.append(torch.stack([seen["resid_post", n][token, 0] for n in range(3)]))
    columns = ["row", *(["draw"] if draws > 1 else []), "sample", "token", "position"]
    if draws == 1:
        wanted = [(row, *others) for row, _, *others in wanted]
    assert list(zip(*(tensors[name].tolist() for name in columns), strict=True)) == wanted
    held = torch.stack([tensors[f"resid_post.layer{n}"] for n in range(3)], dim=1)
    torch.testing.assert_close(held.double(), torch.stack(vectors), atol=1e-4, rtol=1e-3)
    (file,) = result.saved
    assert (file.rows, file.vectors) == (len(rows()), len(wanted))


def _noised(now: torch.Tensor, row: int, draw: int, token: int) -> torch.Tensor:
    return now + 0.7 * noise(row, draw, token, now.shape[-1]).to(now)
