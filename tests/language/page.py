"""The rows of `docs/language.md`, each with a file in which its example can be checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mechdsl.base.limits import LIMITS
from mechdsl.vocab.corruptions import (
    CHANGES,
    NOISES,
    ActivationChange,
    ChangeKind,
    ImageChange,
    TokenChange,
)
from mechdsl.vocab.metrics import EFFECTS, METRICS, MetricArgument, MetricForm
from mechdsl.vocab.reports import REPORTS
from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES, SITES, SiteKind

from .. import fruit
from .constructs import CIRCUIT, CONSTRUCTS, OWN, PATCHING, TRACING, Construct, Group

PAGE = Path(__file__).parents[2] / "docs" / "language.md"

INTRO = """\
# Language reference

Use this page to look up a construct of the language. `mechdsl explain WORD` prints the rows
whose example contains a word:

```sh
mechdsl explain freeze
```

```text
# `freeze`: Rules

`freeze mlp_out layers * at tokens *`
    Holds the value of the base run while other rules change preceding components.
```

Each row has an example, its meaning, the source of the definition, and the test that checks it.
mechdsl rejects some combinations of constructs with [E0108](errors/E0108.md).

These terms and rules apply throughout the page:

- The **base run** is the run that rules act on. The **source run** is the run that
  they read from.
- A **row** is one prompt or image. A **cell** is one combination of the values of all axes.
- A singular word sweeps and a plural word joins: `layer 0..2` is one run per layer, and
  `layers 0..2` is one run with all three layers. Ranges include both ends.
- Rules read values of unpatched runs, or of a `run` that has separate rules.
- If two rules write the same vector, the later one in the file takes precedence. `add`, `scale`,
  `project out` and `clamp` change the value that preceding rules wrote.

You can [define a rule kind in Python](architecture.md#add-a-custom-rule-kind).

`make language` builds this page from the registries in `mechdsl/vocab/` and from
`tests/language/constructs.py`. The [limits](#limits) come from `mechdsl/base/limits.py`.
"""

LIMITS_INTRO = """\
mechdsl limits the size of files, tables and models (`mechdsl/base/limits.py`). A single error
reports the limit that a file exceeds. Within the limits, `mechdsl validate` needs about two seconds
and less than 500 MB. It checks only the first rows of a large table and reports this. Data files
or tokenizers of tens of megabytes take longer."""

STREAMED = """\
mech 1
model toy = zoo("counting")
prompts example {
LINES
  template "{prompt}"
}
basis units = neurons at resid_post layer 2
experiment e {
  prompts example
  save top 2 rows of features * of units at tokens * to "rows.jsonl"
}
"""
"""A file with a block of streamed rows."""

OTHER = "corrupt other { item = other(item) }"
BASE = (
    "mech 1\n\nTOP\n\n"
    + fruit.block('wrong " {count - 1}"', "split 50%", fruit.FEWER, OTHER)
    + """
prompts commas {
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, 3, sep: " , ")
  template "Part 1: {fruits} Count 1:"
  answer " 3"
  corrupt other { item = other(item) }
}

prompts blank {
  template "Part 1: thing Count 1:"
}

"""
    + fruit.block(OTHER).replace("prompts fruit", "prompts listed")
    + """
direction more = mean_difference(fruit, fruit.fewer) at resid_post layer 2 at last token
direction less = 0.5 * more
group early = L0H1, L1H2
group deep = L2H0, top 2 of cie
direction of_head = mean_difference(fruit, fruit.fewer) at z layer 2 head 1 at last token
basis axes = pca(fruit, dims: 4) at resid_post layer 2 at last token
basis tc = fit(transcoder(features: 8, k: 2), prompts: fruit.train, \
measure_on_training_rows: true) at mlp_out layer 1
group few = features 0..2 of tc
probe decoder = fit(ridge, prompts: fruit.train, target: count, measure_on_training_rows: true) at \
resid_post layer 2 at last token
basis chance = random(dims: 4) at resid_post layer 2
direction by_layer = mean_difference(fruit, fruit.fewer) at resid_post layer * at token -2..-1

experiment select {
  model toy
  prompts fruit.train limit 4
  project out by_layer from resid_post layers * at tokens *
  measure kl(clean) as raw
}

experiment cie {
  model toy
  prompts fruit.train limit 4
  from clean into fewer
  patch layer * head * at last token
  measure logit(answer) as delta
}

experiment look {
  model toy
  prompts fruit limit 4
  observe attention layer 2 head 1 from last token to token * align left
}

experiment places {
  model toy
  prompts fruit limit 4
  ablate embed at token * align left with zero
  measure logit(answer) as delta
}

experiment swept {
  model toy
  prompts fruit limit 4
  ablate feature * of axes at last token with zero
  measure logit(answer) as delta
}

experiment writer {
  model toy
  prompts fruit limit 4
  generate 4
  measure length as raw
}

experiment example {
BODY
}
"""
)
"""A file for lines of an experiment."""

PROMPTS = """\
mech 1
model toy = zoo("counting")
prompts example {
LINES
}
experiment e {
  prompts example limit 2
  measure entropy as raw
}
"""
CLASSIFIED = """\
mech 1
model moods = local("MODEL")
prompts reviews {
  said in ["good", "bad"]
  template "the film was {said}"
  answer if said = "good" then "positive" else "negative"
}
experiment e {
  prompts reviews
  LINE
}
"""
"""A file for measures on classifiers; the test copies the models to its folder."""
IMAGES = """\
mech 1
model vit = local("vit")
images scenes {
  kind in ["circle", "square"]
  image shapes(n: 1, kind: kind)
  answer "{kind}"
}
images neutral { image gray(120) }
experiment e {
  model vit
  images scenes limit 4
  SIDES
  patch resid_post layer * at POSITION
  MEASURE
}
"""
"""A file for images."""
ON_IMAGES = """\
mech 1
model vit = local("vit")
images scenes {
  kind in ["circle", "square"]
  image shapes(n: 1, kind: kind)
  region object = mask
  answer "{kind}"
  corrupt near_1 { noise image by 4 }
  corrupt near_2 { noise image by 4 }
}
images neutral { image gray }
experiment caap {
  model vit
  from scenes into neutral
  images scenes limit 4
  patch resid_post layer 0 at each token of image
  measure logit(answer) as delta
}
experiment deleted {
  model vit
  images scenes limit 4
  ablate embed at each token of image with zero
  measure logit(answer) as delta
}
experiment drawn {
  model vit
  images scenes limit 4
  observe random(2) embed at each token of image as sets
}
experiment taken {
  model vit
  images scenes limit 4
  for d in 1..2 { replace top 8 of sets(draw: d) tokens with gray }
  measure logit(answer) as delta
}
experiment near_caap {
  model vit
  from near_1, near_2 into neutral
  images scenes limit 4
  patch resid_post layer 0 at each token of image
  measure logit(answer) as delta
}
experiment e {
  model vit
  images scenes limit 4
BODY
}
"""
"""A file for experiments on images, two of which are maps."""
MODELS = ('model toy = zoo("counting")', 'model twin = zoo("counting")')
LINES = (
    "model toy",
    "prompts fruit limit 16",
    "from clean into other",
    "patch layer * head * at last-item token",
    "measure logit(answer) as delta",
)
"""Lines of an experiment; the example replaces the line that begins with the same word."""
GRID = "patch layer * head * at each item token"
RECORDS = ('template "{prompt}"', 'answer " {n}"')
RULES = (
    "patch",
    "ablate",
    "replace",
    "swap",
    "freeze",
    "set",
    "block",
    "reweight",
    "path",
    "add",
    "scale",
    "project",
    "clamp",
)


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    example: str
    meaning: str
    source: str
    test: str
    file: str
    """The example in a file."""
    absent: bool = False
    """Whether the model of the file lacks the site, so that the file only has to parse."""

    @cached_property
    def checked(self) -> str:
        """The file, without statements of `BASE` that the example doesn't need."""
        return without_unused_statements(self.file)

    @property
    def at(self) -> int:
        """Offset of the example in `checked`."""
        return self.checked.index(self.example)


@dataclass(frozen=True)
class Section:
    title: str
    intro: str
    lines: tuple[Line, ...]


_STATEMENT = re.compile(
    r"^(?:prompts|experiment|direction|group|basis|probe) (\w+)[^\n]*(?:\n  [^\n]*)*(?:\n})?\n",
    re.M,
)


def without_unused_statements(file: str) -> str:
    """Drop statements of `BASE` whose names no other statement of the file contains.

    A file is checked in a fraction of the time without them.
    """
    shared = {match[0] for match in _STATEMENT.finditer(BASE)}
    left = [match for match in _STATEMENT.finditer(file) if match[0] in shared]
    needed = _STATEMENT.sub(lambda match: "" if match[0] in shared else match[0], file)
    while used := [match for match in left if re.search(rf"\b{match[1]}\b", needed)]:
        needed += "".join(match[0] for match in used)
        left = [match for match in left if match not in used]
    for match in left:
        file = file.replace(match[0], "", 1)
    return file


def in_experiment(*lines: str, default: tuple[str, ...] = LINES) -> str:
    """A file with an experiment of these lines, and defaults for missing lines."""
    firsts = {line.split()[0] for line in lines}
    ruled = bool(firsts & {*RULES, "for", "observe"})
    kept = [
        line
        for line in default
        if line.split()[0] not in firsts - {"for"} and not (ruled and line.startswith("patch"))
    ]
    order = ("model", "prompts", "from")
    body = sorted(
        (*kept, *lines), key=lambda line: order.index(w) if (w := line.split()[0]) in order else 9
    )
    return BASE.replace("TOP", "\n".join(MODELS)).replace(
        "BODY", "\n".join(f"  {line}" for line in body)
    )


def in_block(*lines: str) -> str:
    """A file with a prompts block of these lines, and defaults for missing lines."""
    text = " ".join(lines)
    default = RECORDS if '"facts' in text else fruit.VALUES
    if " streamed" in text:
        return STREAMED.replace("LINES", "\n".join(f"  {line}" for line in lines))
    names = {line.split()[0] for line in lines}
    is_chat = "chat" in names
    kept = [line for line in default if line.split()[0] not in names]
    kept = [line for line in kept if not (is_chat and line.startswith("template"))]
    file = PROMPTS.replace('zoo("counting")', 'local("chat")') if is_chat else PROMPTS
    return file.replace("LINES", "\n".join(f"  {line}" for line in (*lines, *kept)))


def on_top(example: str) -> str:
    """A file with this statement."""
    if example == "mech 1":
        return in_experiment()
    models = () if example.startswith("model") else MODELS[:1]
    file = BASE.replace("TOP", "\n".join((*models, example)))
    if example.startswith("use"):
        return (
            f"mech 1\n{example}\nexperiment e {{\n  prompts apples\n  measure entropy as raw\n}}\n"
        )
    model = re.match(r"model (\w+)", example)
    if model is not None:
        file = file.replace("model toy\n", f"model {model[1]}\n")
    lines = (f"model {model[1]}" if model else LINES[0], *LINES[1:])
    if example.startswith("direction d ="):
        lines = tuple(
            "add d to resid_post layer 2 at last token" if line.startswith("patch") else line
            for line in lines
        )
        file = file.replace(MODELS[0], "\n".join(MODELS), 1)
    if example.startswith("basis b ="):
        used = "patch feature 0 of b at last token"
        lines = tuple(used if line.startswith("patch") else line for line in lines)
    if "fit(" in example:  # an experiment doesn't measure training rows
        lines = tuple(line.replace("prompts fruit", "prompts fruit.test") for line in lines)
    return file.replace("BODY", "\n".join(f"  {line}" for line in lines))


def written(entry: Construct) -> str:
    """The example of a construct in a file."""
    context = (entry.context,) if entry.context else ()
    match entry.group:
        case "file":
            return on_top(entry.example)
        case "prompts":
            return in_block(entry.example, *context)
        case "image" | "image position":
            return of_images(entry)
        case "image in prompts":
            return in_image_prompts(entry)
        case "image line":
            return on_images(entry.example)
        case "class":
            return CLASSIFIED.replace("MODEL", "classifier").replace("LINE", entry.example)
        case "position":
            return in_experiment(
                f"ablate resid_post layer 1 at {entry.example} with zero", *context
            )
        case "site":
            return in_experiment(f"patch {entry.example} at last token")
        case _:
            file = in_experiment(entry.example, *context)
            return seeded(file) if " with temperature" in entry.example else file


def seeded(file: str) -> str:
    """The file with a seed."""
    return file.replace("mech 1\n", "mech 1\n\nseed 7\n", 1)


def of_change(change: ImageChange) -> str:
    """A file with a corruption of images or sounds."""
    if change.of == "silence":
        line, context = f"corrupt hidden {{ {change.usage} }}", 'audio a = tone(440) template "{a}"'
        return in_image_prompts(Construct("", "image in prompts", line, "", OWN, "", context))
    lines = f"region object = mask\n  corrupt changed {{ {change.usage} }}"
    file = IMAGES.replace(
        "image shapes(n: 1, kind: kind)", f"image shapes(n: 1, kind: kind) {lines}"
    )
    file = file.replace("SIDES", "from scenes into neutral").replace("POSITION", "tokens *")
    return file.replace("MEASURE", "measure logit(answer) as delta")


def of_images(entry: Construct) -> str:
    """A file with a line about images."""
    example, words = entry.example, entry.example.split()
    block = example.startswith("image ") and entry.group == "image"
    if words[0] == "measure" and "score" in example:
        return on_towers(example)
    if example == "image from scenes":
        return on_texts()
    if words[0] == "classes":
        measure = "measure correct as delta"
        return on_towers(measure).replace('answer "', f'{example}\n  answer "a photo of a ', 1)
    if words[0] in ("region", "tiles", "corrupt"):
        example, block = f"image shapes(n: 1, kind: kind) {example}", True
    own = "image gray(120)" if " of " in example else "image shapes(n: 1, kind: kind)"
    file = IMAGES.replace(own, example) if block else IMAGES
    if words[0] == "images":
        file = file.replace("images neutral", f"{example}\nimages neutral")
    position = example if entry.group == "image position" else "tokens *"
    file = file.replace("POSITION", position)
    file = file.replace("SIDES", example if words[0] == "from" else "from scenes into neutral")
    return file.replace("MEASURE", "measure logit(answer) as delta")


def on_towers(measure: str) -> str:
    """A file with a measure of a model with an image tower and a text tower."""
    file = IMAGES.replace('local("vit")', 'zoo("dual")').replace("POSITION", "tokens *")
    return file.replace("SIDES", "from scenes into neutral").replace("MEASURE", measure)


def on_texts() -> str:
    """A file whose rows are texts scored with images."""
    file = on_towers("measure rank(image) as raw").replace(
        "images scenes limit", "prompts told limit"
    )
    rule = "ablate resid_post layer * at last token with zero"
    file = file.replace("from scenes into neutral", "")
    file = file.replace("patch resid_post layer * at tokens *", rule)
    block = 'prompts told { kind in ["circle", "square"] image from scenes template "a {kind}" }'
    return file.replace("experiment e", f"{block}\nexperiment e")


def in_image_prompts(entry: Construct) -> str:
    """A file whose prompts contain an image, for a missing model."""
    from_block = entry.example.startswith("image from")
    block = 'images circles { kind in ["circle", "square"] image shapes(n: 1, kind: kind) }'
    run = entry.example.split()[1] if entry.example.startswith("corrupt") else ""
    at, line, rule = "last token", entry.example, ""
    measure = "measure logit(answer) as delta"
    if line.startswith("measure"):
        measure, line = line, ""
    elif line.startswith("patch"):
        run, rule, line = "hidden", line, ""
    elif line.startswith("region"):
        at = f"{line.split()[1]} tokens"
    elif line.endswith("token"):
        at, line = line, ""
    lines = [
        "mech 1",
        'model m = local("vlm")',
        *([block] if from_block else []),
        f'prompts ask {{ {entry.context} {line} answer " yes" }}',
        "experiment e {",
        "  model m",
        "  prompts ask limit 8",
        f"  from clean into {run}" if run else "",
        f"  {rule or f'ablate resid_post layer 1 at {at} with zero'}",
        f"  {measure}",
        "}",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def on_images(example: str) -> str:
    """A file with a line of an experiment on images."""
    lines = [example]
    if not example.startswith("observe"):
        lines.append("measure logit(answer) as delta")
    if example.startswith("expect"):
        lines.append("ablate embed at each token of image with zero")
    return ON_IMAGES.replace("BODY", "\n".join(f"  {line}" for line in lines))


def of_group(group: Group) -> Iterator[Line]:
    for _, entry in CONSTRUCTS.items():
        if entry.group == group:
            facts = entry.example, entry.meaning, entry.source, entry.test, written(entry)
            yield Line(*facts, absent=entry.name in NOT_HERE)


# --- the other registries ------------------------------------------------------------------

FRAMEWORK = "Elhage et al. 2021, transformer-circuits.pub/2021/framework"
ROTARY = "Su et al. 2021, arXiv 2104.09864"
EXPERTS = "Shazeer et al. 2017, arXiv 1701.06538"
SITE_SOURCES = {
    "q": FRAMEWORK,
    "k": FRAMEWORK,
    "v": FRAMEWORK,
    "q_rot": ROTARY,
    "k_rot": ROTARY,
    "pattern": FRAMEWORK,
    "scores": FRAMEWORK,
    "z": FRAMEWORK,
    "head_out": FRAMEWORK,
    "router": EXPERTS,
    "expert_out": EXPERTS,
}
METRIC_EXAMPLES: dict[MetricArgument, str] = {
    "target": "{}(answer)",
    "continuation": "{}(answer)",
    "any": "{}(answer, wrong)",
    "numerals": "{}(1..9)",
    "class": "{}(class answer)",
    "label": "{}(class answer)",
    "reference": "{}(clean)",
    "nothing": "{}",
    "prompt": "{}",
    "own": "{} at last-item token",
    "activations": "{}(L1.resid, clean)",
    "rows": "{}",
    "reply": "{}",
    "observation": "observe {} layer * from last token to first-item token",
}
REPLY_EXAMPLES = {
    "contains": 'contains("apple", "pear")',
    "matches": 'matches("[Nn]o\\\\b")',
    "number": "number(last)",
}
EFFECT_SOURCES = {
    "recovery": PATCHING,
    "relative": CIRCUIT,
    "faithfulness": "Mueller et al. 2025, arXiv 2504.13151",
    "completeness": "Marks et al. 2024, arXiv 2403.19647",
    "minimality": "Wang et al. 2022, arXiv 2211.00593",
}
NOT_HERE = ("router", "expert_out", "mixer_norm", "mixer_out", "stack", "path in a stack")
"""Sites that the model of the examples lacks."""


ATTENTION_TEST = "tests/rules/test_attention.py"


def sites() -> Iterator[Line]:
    for name, kind in SITES.items():
        example = " ".join((name, *(f"{axis} *" for axis in kind.axes)))
        yield Line(
            example,
            f"{_sentence(kind.meaning)} {_vector(kind)}",
            SITE_SOURCES.get(name, OWN),
            ATTENTION_TEST if name in ATTENTION_INTERNAL_SITES else "tests/families/test_rows.py",
            in_experiment(f"patch {example} at last token"),
            absent=name in NOT_HERE,
        )


def _vector(kind: SiteKind) -> str:
    return _sentence(kind.shape) if kind.width == "one" else f"Shape `{kind.shape}`."


def metrics() -> Iterator[Line]:
    for name, entry in METRICS.items():
        for form in entry.forms.values():
            example = METRIC_EXAMPLES[form.takes].format(name)
            example = REPLY_EXAMPLES.get(name, example)
            number = name == "output"
            example = example.replace("answer", "0") if number else example
            classified = number or form.takes in ("class", "label")
            observed = example.startswith("observe")
            line = example if observed else f"measure {example} as raw"
            kind = " (a category)" if form.kind == "category" else ""
            yield Line(
                example,
                f"{_sentence(form.meaning)} Unit: {form.unit}{kind}.",
                _of_docstring(form),
                "tests/rules/test_attention.py"
                if observed
                else "tests/images/test_towers.py"
                if name == "score"
                else "tests/execute/test_classifiers.py"
                if classified
                else "tests/results/test_completion_metrics.py"
                if form.takes == "reply"
                else "tests/results/test_metrics.py",
                on_towers(line)
                if name == "score"
                else _on_classifier(line, form, number=number)
                if classified
                else in_experiment(line, LINES[4])
                if observed
                else in_experiment(line, "generate 8")
                if form.takes == "reply"
                else in_experiment(line),
            )


def _on_classifier(line: str, form: MetricForm, *, number: bool) -> str:
    model = "regression" if number else "many" if form.takes == "label" else "classifier"
    return CLASSIFIED.replace("MODEL", model).replace("LINE", line)


def _of_docstring(form: MetricForm) -> str:
    found = re.search(r"^ *source: (.*?)(?:, for .*)?$", form.function.__doc__ or "", re.M)
    return found[1] if found else OWN


def effects() -> Iterator[Line]:
    for name, effect in EFFECTS.items():
        formula = effect.formula
        if effect.per_prompt_formula:
            formula += f"; `{name} per prompt`: {effect.per_prompt_formula}"
        measure, test = f"measure logit(answer) as {name}", "tests/execute/test_effects.py"
        text = in_experiment(measure)
        if effect.circuit is not None:
            rule = effect.circuit.replace("CIRCUIT", "c") + " at tokens * with zero"
            text = in_experiment(rule, measure)
            text = text.replace(
                "experiment ", "circuit c = embed -> L0H1.q, L0H1 -> logits\n\nexperiment ", 1
            )
            formula += f", with the rule `{effect.circuit}`"
            if effect.node_form:
                formula += (
                    f"; with `{effect.node_form}`, ∅ ablates all that the group is chosen from"
                )
            test = "tests/rules/test_ablated_circuits.py"
        source = EFFECT_SOURCES.get(name, OWN)
        yield Line(measure, f"{_sentence(effect.meaning)} {formula}.", source, test, text)


def reports() -> Iterator[Line]:
    for _, kind in REPORTS.items():
        if kind.supported:
            lines = (GRID, LINES[4], "measure argmax(1..9) as raw", kind.example)
            if kind.of_replies:
                lines = (LINES[3], LINES[4], "generate 4", kind.example)
            file, test = in_experiment(*lines), "texts" if kind.of_replies else "reports"
            if kind.of_circuits:
                rule, test = "ablate c at tokens * with zero", "graph_report"
                file = in_experiment(rule, "measure loss as raw", kind.example)
                file = file.replace("experiment ", "circuit c = embed -> logits\nexperiment ", 1)
            yield Line(
                kind.example, _sentence(kind.meaning), OWN, f"tests/results/test_{test}.py", file
            )


def changes() -> Iterator[Line]:
    for _, change in CHANGES.items():
        if change.later:
            continue
        noise = isinstance(change, ActivationChange)
        yield Line(
            change.usage,
            _sentence(change.meaning),
            TRACING if noise else OWN,
            _held(change),
            of_change(change)
            if isinstance(change, ImageChange)
            else in_block("number in 3..9", f"corrupt changed {{ {change.usage} }}"),
        )
    for _, noise in NOISES.items():
        yield Line(
            noise.usage,
            f"{_sentence(noise.meaning)} `3 sd` is three standard deviations, one scalar, of the "
            "embeddings of the named tokens over all rows before `limit`; `samples` averages the "
            "metric over that many draws.",
            TRACING,
            "tests/execute/test_noise.py",
            in_block(f"corrupt noised {{ add {noise.usage} to embed at fruits tokens }}"),
        )


_ROWS = "tests/data/test_rows.py"


def _held(change: ChangeKind[Any]) -> str:
    """The source file of a corruption."""
    if isinstance(change, ImageChange) and change.of == "silence":
        return "tests/image_prompts/test_sounds.py"
    if isinstance(change, ImageChange):
        return "tests/images/test_regions.py"
    if isinstance(change, TokenChange) and change.inserts:
        return "tests/rules/test_inserted_tokens.py"
    return "tests/execute/test_noise.py" if isinstance(change, ActivationChange) else _ROWS


def _sentence(text: str) -> str:
    quoted = text.startswith("`")
    return (text if quoted else text[0].upper() + text[1:]) + "."


# --- the page ------------------------------------------------------------------------------


def sections() -> list[Section]:
    return [
        Section("Top-level statements", "Statements outside all blocks.", tuple(of_group("file"))),
        Section("Prompts", "Lines of a `prompts` block.", tuple(of_group("prompts"))),
        Section(
            "Images",
            "Lines of an `images` block. Supported models are ViT, DeiT, DINOv2 and DINOv3 with "
            "registers, BEiT, and the encoders of CLIP and SigLIP, with or without a classifier.",
            tuple(of_group("image")),
        ),
        Section(
            "Images in prompts",
            "Lines of a `prompts` block for a vision-language model. "
            "[Models](models.md#image-tokens) lists the models. Rules act in the language model, "
            "where `embed` at the tokens of an image is the output of the projector, unless a site "
            "has the word `vision`. "
            "`photo tokens`, `each token of photo` and `photo row 3 col 4 token` are positions, "
            "as for rows of images; rows and columns count over all tiles of an image.",
            tuple(of_group("image in prompts")),
        ),
        Section(
            "Positions in images",
            "Positions after `at` if the rows are images.",
            tuple(of_group("image position")),
        ),
        Section(
            "Experiments on images",
            "Lines of experiments whose rows are images.",
            tuple(of_group("image line")),
        ),
        Section("Corruptions", "Lines of a `corrupt` block.", tuple(changes())),
        Section("Positions", "Positions after `at`.", tuple(of_group("position"))),
        Section("Coordinates", "Layers, heads and neurons of a site.", tuple(of_group("site"))),
        Section(
            "Sites", "Activations that rules and observations can read or write.", tuple(sites())
        ),
        Section(
            "Rules", "Rules, observations and loops of an experiment.", tuple(of_group("rule"))
        ),
        Section(
            "Results of other experiments",
            "Use `top n of EXPERIMENT` in place of a site or a token.",
            tuple(of_group("onward")),
        ),
        Section("Experiments", "All other lines of an experiment.", tuple(of_group("experiment"))),
        Section("Metrics", "Metrics for `measure` and `keep`.", tuple(metrics())),
        Section(
            "Classifiers",
            "Labels in the metrics of classifiers.",
            tuple(of_group("class")),
        ),
        Section("Effects", "Effects after `as`.", tuple(effects())),
        Section("Reports", "Formats after `report`.", tuple(reports())),
        Section("Expectations", "Conditions after `expect`.", tuple(of_group("expectation"))),
    ]


def page() -> str:
    return "\n".join([INTRO, *map(_table, sections()), _limits()])


def _limits() -> str:
    rows = [("limit", "maximum", "error beyond the maximum"), ("---",) * 3]
    rows += [
        (limit.of, f"{limit.most:,}", ", ".join(f"[{c}](errors/{c}.md)" for c in limit.codes))
        for limit in LIMITS
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## Limits\n\n{LIMITS_INTRO}\n\n{table}\n"


def _table(section: Section) -> str:
    rows = [("example", "meaning", "source", "test"), ("---",) * 4]
    rows += [
        (f"`{_cell(line.example)}`", _cell(line.meaning), line.source, f"`{line.test}`")
        for line in section.lines
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## {section.title}\n\n{section.intro}\n\n{table}\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
