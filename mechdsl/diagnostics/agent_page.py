"""The page of `mechdsl explain language --for-agents`: the whole language in 8,000 tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_TOKENS = 8000

CHARACTERS_PER_TOKEN = 3.5
"""A conservative estimate for English mixed with code: BPE vocabularies of 50,000 words and more
average 3.6 to 4.2 characters per token on such text."""

_MEANING = 38
"""Maximum length, in characters, of a construct's meaning."""

_EXAMPLES_ONLY = (
    *("Images", "Positions in images", "Experiments on images", "Classifiers"),
    *("Coordinates", "Corruptions", "Reports"),
)
"""Sections whose rows are printed without meanings, which `explain WORD` has."""

_INTRO = """\
# mechdsl for agents

A `.mech` file defines models, prompts and experiments. Commands:

    mechdsl validate FILE --format json  # exit status 2: errors
    mechdsl plan FILE  # cost
    mechdsl run FILE --format json  # --limit 8: quick try, --set name=VALUE
    mechdsl explain FILE  # tokens of prompts
    mechdsl explain WORD  # word or code: E0301
    mechdsl sites counting
    mechdsl new FILE --task counting

Rules of the notation:

- The first line is `mech 1`. `#` begins a comment.
- Blocks are in braces. Options have a colon: `pca(fruit, component: 2)`. Texts are in `"…"`.
- Layers and heads count from 0. Ranges include both ends. `*` means all.
- The singular sweeps (`layer 0..2`: three runs), the plural joins (`layers 0..2`: one run).
- Order in a rule: verb, site, `at` position: `patch resid_post layer 3 at last token`.
- `from SOURCE into BASE` names runs: `clean`, a `corrupt` block, or `other_prompts.clean`.
  Rules act on the base run; `patch` reads from the source run.
- In texts `{name}` inserts a value and marks a span: `last-name token`.
- An answer usually begins with a space: `answer " {count}"`.
- `measure EXPRESSION as EFFECT`: `raw` (value), `delta` (change) or `recovery` (0 base, 1 source).
- All rules of an experiment act in one run; their sweeps are its axes.
"""

AGENT_SETUP = """\
mech 1

model toy = zoo("counting")  # or hf("gpt2"), local("folder")

prompts fruit {
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
  corrupt fewer { count = count - 1 }
  split 50%
}
"""
"""The beginning of each example."""

AGENT_EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "Which heads carry the answer? Activation patching",
        """\
experiment heads {
  prompts fruit.train limit 16
  from clean into fewer
  patch layer * head * at last token
  measure logit(answer) - logit(answer of fewer) as recovery
  stats bootstrap(1000) correct bh
  report heatmap layer by head
  report table top 5
}
""",
    ),
    (
        "Which MLPs are needed? Mean ablation",
        """\
experiment mlps {
  prompts fruit limit 16
  ablate mlp_out layer * at last token with mean
  measure logprob(answer) as delta
  report table
}
""",
    ),
    (
        "Which tokens does the last token read? Attention knockout",
        """\
experiment knockout {
  prompts fruit limit 16
  block attention layer * window 2 from last token to fruits tokens
  measure prob(answer) as delta
  report lines layer
}
""",
    ),
    (
        "Which heads write to logits? Path patching",
        """\
experiment paths {
  prompts fruit limit 16
  from clean into fewer
  path layer 0 head * -> logits at last token
  measure logit(answer) as delta
  report table
}
""",
    ),
    (
        "Does a direction raise the count? Steering with random controls",
        """\
direction more = mean_difference(fruit.train, fewer of fruit.train)
  at resid_post layer 2 at last token

experiment steer {
  prompts fruit.test limit 16
  for c in [0, 1, 2] { add c * more to resid_post layer 2 at last token }
  against random(19, directions)
  measure expected(1..9) as delta
  report lines c
}
""",
    ),
    (
        "At which layer is the count readable? A probe",
        """\
experiment probe_count {
  prompts fruit limit 64
  observe probe(count) at resid_post layer * at last-item token
  report lines layer
}
""",
    ),
    (
        "Where does the answer appear? The logit lens",
        """\
experiment lens {
  prompts fruit limit 16
  observe logit_lens resid_post layer * at last token top 3
  measure prob(answer) as raw
  report lines layer
}
""",
    ),
    (
        "Do the best heads of one half work on the other half? A selection and a claim",
        """\
experiment rank {
  prompts fruit.train limit 16
  ablate layer * head * at last token with mean
  measure logit(answer) as delta
}

group found = top 2 of rank

experiment check {
  prompts fruit.test limit 16
  ablate found at last token with mean
  against random(9)
  measure logit(answer) as delta
  expect min(delta) < 0
}
""",
    ),
    (
        "What does the model write under an intervention? Generation",
        """\
experiment writes {
  prompts fruit limit 8
  generate 3
  ablate layers * heads * at last token with zero during prefill
  measure exact_match(answer) as delta
  report table
}
""",
    ),
    (
        "Prompts from a file, and your own metric",
        """\
prompts mine {
  rows "rows.jsonl"
  template "Part 1: {fruits} Count 1:"
  answer " {label}"
}

metric margin = logit(answer) - logit(" 9")

experiment own {
  prompts mine
  ablate resid_post layer * at last-fruits token with mean
  measure margin as delta
  report table
}
""",
    ),
)
"""Title and statements of each example; `AGENT_SETUP` is before the statements."""


def write_agent_page(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return the page.

    Args:
        rows: Section, example and meaning of every construct. An example that repeats in its
            section is printed once.
    """
    lines = [_INTRO, "## Ten examples", "", "All begin with these lines:", ""]
    lines += ["```mech", AGENT_SETUP.rstrip(), "```", ""]
    for title, statements in AGENT_EXAMPLES:
        lines += [f"{title}:", "", "```mech", statements.rstrip(), "```", ""]
    lines += ["## Every construct", ""]
    lines += ["`mechdsl explain WORD` prints what is left out here.", ""]
    previous = ""
    printed: set[tuple[str, str]] = set()
    for section, example, meaning in rows:
        if section != previous:
            lines += [f"### {section}", ""]
            previous = section
        if (section, example) in printed:
            continue
        printed.add((section, example))
        code = example.strip("`")
        short = "" if section in _EXAMPLES_ONLY else _shorten(meaning)
        lines.append(f"{code}  # {short}" if short else code)
    return "\n".join(lines) + "\n"


def _shorten(meaning: str) -> str:
    """Return the first clause of a meaning, or nothing if it is long."""
    first = re.split(r"(?<=\w)[.;:](?:\s|$)| \(", meaning, maxsplit=1)[0]
    first = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", first)
    return first if len(first) <= _MEANING else ""


def count_tokens(text: str) -> int:
    """Estimate the tokens of a text."""
    return round(len(text) / CHARACTERS_PER_TOKEN)
