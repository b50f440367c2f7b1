"""Random rules during generation: cached keys and values equal full forward passes, in replies and
in measures of replies.

Runs use 64 bits, so that no choice of a token depends on rounding.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import event
from hypothesis import strategies as st

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import PASS_NAMES
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from ..models import families
from ..rules.models import double
from . import support
from .drawn import Case, both_ways, few, many, same
from .test_random_files import MORE, ONE, OWN, PROMPTS, RUNS, rules

FAMILIES = ("gpt2", "llama", "gpt_neox", "mistral")
TOKENS = 4
PHASES = ("", "during prefill", "after prefill")
STEPS = ("", "during each step", "during step 1..2", f"during step 2..{TOKENS - 1}")
SWEPT = ("during step s", "during step s..s + 1")
"""In a loop over steps."""
FOLLOWING = ("last token", "tokens *", "{cue token, last token}")


@st.composite
def acting(draw: Any, *, swept: bool) -> str:
    """A rule and when it acts; mostly one that follows the newest token."""
    rule = draw(rules(swept=swept).filter(lambda text: not text.startswith("observe")))
    before, at, behind = rule.partition(" at ")
    phases = PHASES if " k " in before or " v " in before else PHASES[:2]
    if at and draw(st.integers(0, 3)):
        word = next((w for w in (" with ", " to ", " by ", " onto ", " into ") if w in behind), "")
        rest = word + behind.partition(word)[2] if word else ""
        rule = f"{before} at {draw(st.sampled_from(FOLLOWING))}{rest}"
        phases = (*phases, *STEPS)
        if swept and not draw(st.integers(0, 3)):
            return f"for s in [0, 2, 1] {{ {rule} {draw(st.sampled_from(SWEPT))} }}"
    return f"{rule} {draw(st.sampled_from(phases))}".strip()


TALK = """
prompts talk {
  rows "data.jsonl"
  xs = list(item, from: words, sep: " ")
  chat {
    system "w5 w6"
    user "{xs} w40"
    assistant "w9 w9"
    user "{subject} w41 {cue} w42"
  }
  answer " {a}"
  wrong " {b}"
  corrupt other { subject = alt }
  corrupt longer { words = more  cue = cue2 }
  corrupt turned { words = turned }
  corrupt noised { add gaussian(std: 0.5, samples: 2) to embed at subject tokens }
}
"""
TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}"
    "{{ ' w45 ' if turn.role == 'user' else ' w46 ' }}{{ turn.content + ' w47' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' w48' }}{% endif %}"
)
TWO = "logit(answer) - logit(wrong)"
IN_REPLIES = (
    "entropy at each step as delta",
    "kl(clean) at each step as raw",
    "kl(longer) at each reply token as raw",
    "loss at each reply token as delta",
    f"{TWO} at last token of reply as delta",
    f"{TWO} at reply token 2..3 as raw",
    "top_margin at reply token 2 as delta",
    "prob(answer) at first token of reply + 1 as delta",
    'entropy at "w1" of reply token as delta',
    "entropy at answer of reply token as delta",
)
PLACES = (
    "each reply token",
    "each step",
    "last token of reply",
    "reply tokens",
    "reply token 2",
    '"w1" of reply token',
    "answer of reply token",
)
SEEN = (
    "norm resid_post layer 2 at {}",
    "norm attn_out layers 0..1 at {}",
    "entropy pattern layer 1 at {}",
    "distance(2) pattern layer 2 at {}",
    "logit_lens resid_post layer 1 at {}",
    "direct_logit layers 0..1 head 1 toward answer - wrong at {}",
    "attention layer 2 head 0..1 from {} to first token of reply",
)
"""Observations at a position of a reply."""


@st.composite
def read(draw: Any, base: str) -> list[str]:
    """Lines that measure, observe or save something of replies."""
    lines: list[str] = []
    if draw(st.booleans()):
        # Measures at other positions have other cells.
        first = draw(st.sampled_from(IN_REPLIES))
        place = first.partition(" at ")[2].rpartition(" as ")[0]
        others = [each for each in IN_REPLIES if f" at {place} as" in each]
        lines = [f"measure {own}" for own in {first, draw(st.sampled_from(others))}]
        return sorted(lines)
    place = draw(st.sampled_from(PLACES))
    match draw(st.integers(0, 4)):
        case 0:
            seen = draw(st.sampled_from(SEEN)).format(place)
            lines += [f"observe {seen} as looked", "measure looked as delta"]
        case 1:
            at = draw(st.sampled_from((*ONE, "subject tokens", "tokens *")))
            lines.append(f"observe attention layer 1 head * from {place} to {at}")
        case 2:
            run = draw(st.sampled_from([base, "turned"]))
            both = draw(st.sampled_from(["", "last token, "]))
            lines.append(f'save mlp_out layer * of {run} at {both}{place} to "0.safetensors"')
        case _:
            pass
    return lines


@st.composite
def cases(draw: Any) -> Case:
    """(family, file, passes that are switched off in the planned run)."""
    source, base = draw(st.permutations([*RUNS, "clean"]))[:2]
    lines = [draw(acting(swept=number == 0)) for number in range(draw(st.integers(1, 2)))]
    sampled = draw(st.sampled_from(["", "", "with temperature 2, samples 2", 'until "w1"']))
    generate = f"generate {TOKENS} {sampled}".strip()
    length, what = "measure length as raw", draw(read(base))
    text = (
        "seed 3\n"
        + MORE
        + TALK
        + support.experiment(
            "e",
            f"prompts {draw(st.sampled_from(['p', 'p', 'talk']))}",
            f"from {source} into {base}",
            *lines,
            generate,
            *what,
            *([] if any(each.startswith("measure") for each in what) else [length]),
        )
    )
    off = draw(st.sets(st.sampled_from(PASS_NAMES), max_size=2))
    return draw(st.sampled_from(FAMILIES)), text, frozenset(off)


@cache
def talking(family: str) -> LoadedModel:
    """In 64 bits, with a chat template."""
    tokenizer: Any = support.fast(families.tokenizer())
    tokenizer.chat_template = TEMPLATE
    model, problems = adopt_model("m", double(family), tokenizer)
    assert model is not None, problems
    return model


def compare(case: Case, tmp_path: Path) -> None:
    family, text, off = case
    support.write_rows(tmp_path)
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    file = f'mech 1\nmodel m = local("handed over")\n{PROMPTS}\n{text}'
    source = Source(file, tmp_path / "f.mech")

    def run(options: RunOptions) -> tuple[FileResult | None, list[Diagnostic]]:
        return support.run_on(source, {"m": talking(family)}, options)

    found = both_ways(run, off, tmp_path, ExecutionOptions(pass_tokens=40))
    if found is None:
        return
    plain, planned = found
    for one, other in zip(plain.experiments, planned.experiments, strict=True):
        same(one, other, text)
        assert one.replies == other.replies, text
        hold_base(one, family)
        base = one.replies.runs[one.base]
        changed = any(
            base.get(row) != own for each in one.replies.cells for row, own in each.items()
        )
        event(f"run, replies differ: {changed}")


def hold_base(found: ExperimentResult, family: str) -> None:
    """Check the base of `delta` at each step: the prompt and the reply, without rules."""
    for measure in found.measures:
        if measure.label != "entropy" or "samples" in str(found.conventions):
            continue
        if "step" not in found.axes:  # at a position of the reply
            continue
        for cell, each in enumerate(found.cells):
            for row, (reply, *more) in found.replies.cells[cell].items():
                step, at = int(str(each.coords["step"])), found.row_ids.index(row)
                if more or step > len(reply.ids):
                    continue
                prompt = found.replies.prompts[row]  # that of a chat has its `<s>`
                special = not prompt.startswith("<s>")
                ids = support.word_tokenizer()(prompt, add_special_tokens=special)["input_ids"]
                with torch.no_grad():
                    logits = double(family)(torch.tensor([[*ids, *reply.ids]])).logits[0]
                log = logits[len(ids) - 1 + step].log_softmax(-1)
                wanted = float(-(log.exp() * log).sum())
                base = np.broadcast_to(measure.base, measure.patched.shape)[cell, at]
                assert abs(base - wanted) < support.ABSOLUTE


test_cached_keys_equal_full_forward_passes = few(cases(), 5)(compare)
test_cached_keys_equal_full_forward_passes_on_many_files = many(cases(), 300)(compare)
