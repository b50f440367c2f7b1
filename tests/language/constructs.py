"""What the grammar itself knows: statements, lines of prompts, positions, rules, expectations.

One registered entry each, as far as it is executed; `docs/language.md` is written from them and
from the registries in `mechdsl/vocab/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mechdsl.base.records import Registry
from mechdsl.program.estimators import ESTIMATORS

Group = Literal[
    "file", "prompts", "image", "image position", "image line", "position", "site", "rule",
    "onward", "experiment", "class", "expectation",
]  # fmt: skip

OWN = "this page"
"""The source of a definition that comes from no paper."""
TRACING = "Meng et al. 2022, arXiv 2202.05262"
PATCHING = "Zhang & Nanda 2023, arXiv 2309.16042"
MEDIATION = "Vig et al. 2020, arXiv 2004.12265"
CIRCUIT = "Wang et al. 2022, arXiv 2211.00593"
PATHS = "Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969"
KNOCKOUT = "Geva et al. 2023, arXiv 2304.14767"
SCOPES = "Ghandeharioun et al. 2024, arXiv 2401.06102"
ACROSS = "Prakash et al. 2024, arXiv 2402.14811"
VECTORS = "Todd et al. 2023, arXiv 2310.15213"
DELETION = "Petsiuk et al. 2018, arXiv 1806.07421"
STEERING = "Turner et al. 2023, arXiv 2308.10248"
REFUSAL = "Arditi et al. 2024, arXiv 2406.11717"
MEAN_DIFFERENCE = "Marks & Tegmark 2023, arXiv 2310.06824"
_REPLIES = "tests/rules/test_generation.py"
ATTENTION = "Vaswani et al. 2017, arXiv 1706.03762"


@dataclass(frozen=True)
class Construct:
    """One construct of the language."""

    name: str
    group: Group
    example: str
    """As it is typed: a line, a position or a site."""
    meaning: str
    source: str
    """A paper with its number, or `this page`."""
    test: str
    """The file that holds its meaning."""
    beside: str = ""
    """Lines of the same block that the example needs."""


CONSTRUCTS: Registry[Construct] = Registry("construct")


def _construct(entry: Construct) -> None:
    CONSTRUCTS.add(entry.name, entry)


def _class(name: str, example: str, meaning: str) -> None:
    test = "tests/execute/test_classifiers.py"
    _construct(Construct(name, "class", example, meaning, OWN, test))


_ON_IMAGES = "tests/images/test_blocks.py"


def _image(
    name: str, example: str, meaning: str, test: str = _ON_IMAGES, source: str = OWN
) -> None:
    _construct(Construct(name, "image", example, meaning, source, test))


def _in_image(name: str, example: str, meaning: str) -> None:
    _construct(Construct(name, "image position", example, meaning, OWN, _ON_IMAGES))


def _on_image(name: str, example: str, meaning: str, source: str, test: str) -> None:
    """A line of an experiment on images."""
    _construct(Construct(name, "image line", example, meaning, source, test))


def _file(name: str, example: str, meaning: str, test: str, source: str = OWN) -> None:
    _construct(Construct(name, "file", example, meaning, source, test))


def _prompts(
    name: str, example: str, meaning: str, test: str, source: str = OWN, beside: str = ""
) -> None:
    _construct(Construct(name, "prompts", example, meaning, source, test, beside))


def _position(name: str, example: str, meaning: str, beside: str = "") -> None:
    test = "tests/execute/test_positions.py"
    _construct(Construct(name, "position", example, meaning, OWN, test, beside))


def _answer_position(name: str, example: str, meaning: str) -> None:
    test = "tests/execute/test_answer_tokens.py"
    _construct(Construct(name, "position", example, meaning, OWN, test))


def _site(name: str, example: str, meaning: str, test: str, source: str = OWN) -> None:
    _construct(Construct(name, "site", example, meaning, source, test))


def _rule(name: str, example: str, meaning: str, source: str, test: str, beside: str = "") -> None:
    _construct(Construct(name, "rule", example, meaning, source, test, beside))


def _onward(name: str, example: str, meaning: str, source: str, test: str) -> None:
    _construct(Construct(name, "onward", example, meaning, source, test))


def _experiment(
    name: str, example: str, meaning: str, test: str, source: str = OWN, beside: str = ""
) -> None:
    _construct(Construct(name, "experiment", example, meaning, source, test, beside))


def _expectation(
    name: str, example: str, meaning: str, test: str = "", source: str = OWN, beside: str = ""
) -> None:
    test = test or "tests/results/test_expectations.py"
    _construct(Construct(name, "expectation", example, meaning, source, test, beside))


# --- the file -------------------------------------------------------------------------------------

_LOWER = "tests/compiler/test_lower.py"
_ROWS = "tests/data/test_rows.py"

_file("version", "mech 1", "The first line: the version of the language.", _LOWER)
_file(
    "use",
    'use "common/fruit.mech"',
    "Everything that another file defines; its experiments don't run. The path is relative to the "
    "file that has the line.",
    _LOWER,
)
_file(
    "param",
    "param depth = 2",
    "A value with a name. `--set depth=3` changes it, and nothing else can be set from outside.",
    "tests/execute/test_effects.py",
)
_file(
    "model",
    'model toy = zoo("counting")',
    'A model: of the package (`zoo`), of the Hugging Face cache (`hf("org/name", revision: "…", '
    'dtype: float32, bos: true)`) or of a folder (`local("…")`).',
    "tests/models/test_load.py",
)
_file(
    "adapter",
    'model base = zoo("counting") model tuned = local("adapter", base: base)',
    "A LoRA adapter as peft saves it, in a folder or in the cache (`hf`), merged into a copy of "
    "another model of the file, which may be an adapter too; needs `mechdsl[adapters]` to run. "
    "Shape and precision are the base's, and the tokenizer, unless the folder has one.",
    "tests/models/test_adapters.py",
)
_file(
    "model of Python",
    'model toy = python("functions.py:build")',
    "The model and the tokenizer that a function gives, which takes nothing. It is called once a "
    "run, with `--allow-python`; `validate` never calls it.",
    "tests/python_files/test_models.py",
)
_file(
    "checkpoints",
    'model runs = local("runs/step-*")',
    "One model for every folder that the `*` matches, in natural order; where it is used, the "
    "experiment runs on each, an axis `model` with what the `*` stands for. With `base:` they are "
    'adapters. `zoo("induction/step-*")` are those of a training that come with the package.',
    "tests/elsewhere/test_models.py",
)
_file(
    "prompts block",
    'prompts colours { x in ["red", "blue"] template "Part 1: {x} Count 1:" }',
    "Rows of text with named spans and values; its lines are below.",
    _ROWS,
)
_file(
    "metric",
    "metric ld = logit(answer) - logit(wrong)",
    "A name for an expression that measures may use.",
    "tests/execute/test_metrics.py",
)
_file(
    "metric in Python",
    'metric margin = python("functions.py:margin")',
    "A function of a Python file, called as `margin(logits, rows)`: the logits where the measure "
    "is read, [row, vocab], and the values of each row. It gives one number per row, and runs with "
    "`--allow-python` only; the file's hash is kept. With a third argument, or one called "
    "`tokenizer`, it is given the model's, a `tokenizers.Tokenizer`: "
    '`tokenizer.encode(" yes", add_special_tokens=False).ids`.',
    "tests/python_files/test_python_files.py",
)
_file(
    "group",
    "group counters = L0H1, L1H2",
    "Sites that a rule intervenes on together.",
    "tests/execute/test_coordinates.py",
)
_file(
    "group of receivers",
    "group ends = L2H1.q, L2H3.q, logits",
    "With `path SENDER -> ends at POSITIONS` the edges to all of these are patched at once. To "
    "the end of the model beside other receivers, every other edge carries what its own node "
    "computes in that run: the receivers get what they read where all else is held, what lies "
    "behind them recomputes, and what the sender alone changes in the stream behind the last "
    "block is added to it. There the others read in the attention of one layer or in one MLP, "
    "all senders come before them, and it is neither `through mlps` nor `with frozen norms` "
    "(E0334); not where norms stand behind the sums, as in BERT (E0108). Rows are whole passes.",
    "tests/rules/test_paths_to_end.py",
    "Conmy et al. 2023, arXiv 2304.14997; Goldowsky-Dill et al. 2023, arXiv 2304.05969",
)
_STEERING = "tests/rules/test_steering.py"
_FITTED = "tests/rules/test_direction_fits.py"

_file(
    "direction: difference of means",
    "direction d = mean_difference(fruit.train, fewer of fruit.train) at resid_post layer 2 at "
    "last token",
    "The mean over the rows of one run less that of another: of a block, a part (`fruit.train`), "
    "a corruption (`fruit.fewer`, `fewer of fruit.train`). One vector of each row that has the "
    "position; several tokens of a row are averaged. Without a position it is the last token. All"
    " rows of the block are read, whatever the experiment's `limit`. The conventions say what was"
    " read and the norm.",
    _STEERING,
    MEAN_DIFFERENCE,
)
_file(
    "direction: how many rows",
    "direction d = mean_difference(fruit, fruit.fewer, limit: 64) at resid_post layer 2",
    "The first 64 rows of each block, the same that `prompts fruit limit 64` takes. A block with "
    "lists has more rows than combinations of its values: further ones draw other lists. All ways "
    "that read rows take `limit:`.",
    _FITTED,
    OWN,
)
_file(
    "direction: two models",
    "direction d = mean_difference(toy, twin, prompts: fruit) at resid_post layer 2 at last token",
    "The same rows in two models of one shape; without `prompts:` the rows of the experiment that"
    " uses it.",
    _STEERING,
    OWN,
)
_file(
    "direction: mean",
    "direction d = mean(fruit) at head_out layer 1 heads 0..2 at last token",
    "The mean over rows. Joined heads, or a group of heads, go each through its slice of the "
    "output projection and are summed: a function vector.",
    _STEERING,
    VECTORS,
)
_file(
    "direction: component",
    "direction d = pca(fruit, component: 2) at resid_post layer 2 at last token",
    "A principal component of the rows, of length 1; its coordinate of the largest size is "
    "positive.",
    _STEERING,
    "Zou et al. 2023, arXiv 2310.01405",
)
_file(
    "direction: probe",
    "direction d = probe(count, fruit) at resid_post layer 2 at last token",
    "The weights of a ridge regression on a value that is a number, or of a logistic regression "
    "between the two words that a value has (`kind:`), with the `penalty:` 1 unless it is said. It "
    "points to larger numbers, or from the first word of the alphabet to the other.",
    _FITTED,
    OWN,
)
_file(
    "direction: unembedding",
    'direction d = unembedding(" 3", " 2")',
    "The unembedding's row of a token, less that of another, without the last norm.",
    _STEERING,
    OWN,
)
_file(
    "direction: saved",
    'direction d = saved("directions.safetensors", "d")',
    "A vector of a safetensors file, whose hash is kept with the results.",
    _STEERING,
    OWN,
)
_file(
    "direction: arithmetic",
    "direction d = unit(more) - 0.5 * by_layer[layer 1, token -1]",
    "Sums of directions, times numbers; `unit(…)` has length 1.",
    _STEERING,
    OWN,
)
_file(
    "direction: a family",
    "direction d = mean_difference(fruit, fruit.fewer) at resid_pre layer * at token -2..-1",
    "One for every layer, head and position that is swept.",
    _STEERING,
    REFUSAL,
)
_file(
    "group of what was found",
    "group fv_heads = top 3 of cie",
    "The sites that another experiment ranks highest, joined.",
    "tests/onward/test_sites.py",
    VECTORS,
)
_file(
    "seed",
    "seed 7",
    "Where all randomness begins: rows, noise, resampling, random targets. 0 without this line. "
    "What is drawn for a row hangs on what is in it, not on its place: a data file whose lines are "
    "sorted otherwise gives the same table.",
    "tests/data/test_sampling.py",
)
_file(
    "experiment",
    "experiment heads { model toy prompts fruit limit 16 "
    "ablate layer * head * at last token with zero measure logit(answer) as delta }",
    "Rules, measures and reports. All its rules act in one run; their sweeps are the axes of its "
    "table, one run for every combination.",
    "tests/execute/test_coordinates.py",
)

# --- prompts --------------------------------------------------------------------------------------

_prompts(
    "template",
    'template "Part 1: {fruits} Count 1:"',
    "The text. Each placeholder is a span with that name; `{s2 = s}` is a second span of its own.",
    _ROWS,
)
_prompts(
    "several templates",
    'template in ["Part 1: {fruits} Count 1:", "Part 2: {fruits} Count 2:"]',
    "Each is combined with all values; `template` is a value like others.",
    _ROWS,
)
_prompts(
    "chat",
    'chat { system "Count 1:" user "Part 1: {fruits} Count 1:" assistant "There are" }',
    "Turns, written by the chat template of the model's tokenizer; each is a span of its role "
    "(`last-user token`, `user 2 tokens`). A last turn of the assistant is a reply that has begun; "
    "without one the template opens a reply. Special tokens are the template's own: a row whose "
    "text holds one is refused. Templates know no time: today is 26 July 2024.",
    "tests/data/test_chats.py",
    "transformers, `apply_chat_template`",
)
_prompts("values", "count in 3..9", "The values of a name; every combination is a row.", _ROWS)
_prompts(
    "derived value",
    "half = count / 2",
    "Worked out of other values: arithmetic, `other(x)` (another value of the same domain; several "
    "different ones: `a, b = others(x)`), `choice(…)`, `shuffle(column)`, `if … then … else …`.",
    _ROWS,
)
_prompts(
    "list",
    'fruits = list(item, count, sep: " ")',
    "`count` draws of `item`, joined by `sep`; each draw is a span `item`, each separator a span "
    "`sep of fruits`.",
    _ROWS,
)
_prompts(
    "list of records",
    'shots = list("{prompt} {n}", 1, from: example)',
    "Each item is a text about a whole record of a block with `rows`, this one or another: the "
    "shots of a few-shot prompt. The row's own record is never among them, nor one twice with "
    "`distinct: true`. Their placeholders are spans: `each n of shots token`.",
    "tests/data/test_shots.py",
    VECTORS,
    beside='rows "facts.jsonl"',
)
_prompts(
    "shuffled shots",
    "corrupt mixed { shots = shuffle(shots, colour) }",
    "The same shots with one of their values dealt out anew among them, so that it fits no "
    "longer; what follows them stays. Where any two differ, at least one text changes.",
    "tests/data/test_shots.py",
    VECTORS,
    beside='template "{shots} Count 1:" colour in ["red", "green"] '
    'shots = list("{item} {colour}", 4, sep: " ")',
)
_prompts(
    "value in Python",
    'size = python("functions.py:total")',
    "A function of a Python file, called as `total(row)` with the values of the row, a `dict`. In "
    "a corruption it makes the new value. It runs with `--allow-python` only.",
    "tests/python_files/test_python_files.py",
)
_prompts(
    "rows",
    'rows "facts.jsonl"',
    "One row per record of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file; its columns "
    "are values.",
    "tests/data/test_files.py",
)
_prompts(
    "rows of a data set of the hub",
    'rows hf_dataset("facts", split: "train")',
    "One split of a data set that is on this disk: a folder that `save_to_disk` of the package "
    "`datasets` wrote, a folder of files, or, by its name, a snapshot in the Hugging Face cache; "
    "`config:` and `revision:` say which one. Nothing is downloaded. Arrow and parquet need "
    "`pip install 'mechdsl[frames]'`.",
    "tests/data/test_hub_datasets.py",
)
_prompts(
    "distinct rows",
    'rows "facts.jsonl" distinct',
    "Of equal records the first; without it each counts, and W0781 says how many there are. "
    "Generated rows that are equal count once anyhow. `split` keeps equal records together.",
    "tests/data/test_rows.py",
)
_prompts(
    "rename",
    "rename { thing = object }",
    "New name = column.",
    "tests/data/test_files.py",
    beside='rows "facts.jsonl"',
)
_prompts("where", "where count > 3", "Only rows for which this holds.", _ROWS)
_prompts(
    "where tokens",
    "where tokens(answer) = 1",
    "How many tokens a text has behind the prompt, or a span in it (`tokens(subject)`), for the "
    "tokenizer of the model that runs. A space of its own in front of a text isn't counted.",
    "tests/data/test_tokens_counted.py",
)
_prompts(
    "split",
    "split 50%",
    "Deals the rows out into `NAME.train`, which gets this share, and `NAME.test`; a row is in the "
    "same part for every experiment.",
    "tests/execute/test_effects.py",
)
_prompts(
    "answer",
    'answer " {count}"',
    "The text that should come next. It is tokenised as a continuation of the prompt; a leading "
    "token that all answers share is moved into the prompt.",
    "tests/data/test_answers.py",
)
_prompts("wrong", 'wrong " {count - 1}"', "A text to compare with.", "tests/data/test_answers.py")
_prompts(
    "text",
    'text rival = " {count + 1}"',
    "Any other text that measures name.",
    "tests/data/test_answers.py",
)
_prompts(
    "span in a column",
    "span object in prompt",
    "Where the text of one column lies inside that of another.",
    "tests/data/test_positions.py",
    beside='rows "facts.jsonl"',
)
_prompts(
    "named span",
    'span slot = "Count"',
    "A name for the last occurrence of a literal text.",
    "tests/data/test_positions.py",
)
_prompts(
    "corrupt",
    "corrupt fewer { count = count - 1 }",
    "The same row with something changed, a second run of it. What is derived from the value "
    "follows; a list keeps its draws and is cut or extended at its end. Rows that it leaves as "
    "they are drop out of experiments and fits that use it, and of no others; how many is "
    "said below the table.",
    _ROWS,
)

# --- positions ------------------------------------------------------------------------------------

_position("last token", "last token", "The last token of the prompt's own text.")
_position("first token", "first token", "The first token of the prompt's own text.")
_position("special token", "bos token", "A special token by its name: `bos`, `cls`, `sep`.")
_position(
    "token 5",
    "token 5",
    "The token of this number in the model's input, special tokens included; negative numbers "
    "count from the end.",
)
_position("range of tokens", "token 2..6", "A sweep, one run per token; both ends included.")
_position("tokens 2..6", "tokens 2..6", "All of them in one run.")
_position(
    "token *",
    "token * align left",
    "A sweep over every token. Prompts of different lengths are lined up at the `left` or the "
    "`right`.",
)
_position("tokens *", "tokens *", "All tokens in one run.")
_position("NAME token", "fruits token", "The last token of a span that occurs once.")
_position("NAME tokens", "fruits tokens", "All tokens of a span, of all its occurrences, joined.")
_position(
    "each token of",
    "each token of fruits",
    "One run per token of the span; spans of several lengths are labelled first, middle, last.",
)
_position("first token of", "first token of fruits", "The first token of a span.")
_position("offset", "last-item token + 1", "So many tokens later, or earlier with `-`.")
_position(
    "last-NAME", "last-item token", "The last occurrence of a span that occurs several times."
)
_position("NAME number", "item 3 token", "The third occurrence, counted from 1.")
_position(
    "each NAME",
    "each item token",
    "One run per occurrence, at its last token; prompts with fewer occurrences drop out of that "
    "cell, and n tells. The axis is called `position` and `item`, and the JSON's coordinates have "
    "both, `item` as a number (`expect prob(item: 3) > 0.5`); `{item.index}` in the text that a "
    'metric names, as in `prob(" {item.index}")`, is the number of the occurrence.',
)
_position(
    "separators",
    "each sep of fruits token",
    "The separators of a list, one run each.",
    beside="prompts commas limit 4",
)
_position("literal", '"Count" token', "The last occurrence of a literal text.")
_position("inside another", "last-item of fruits token", "An occurrence inside another span.")
_position("A, B", "last-item token, last token", "A sweep over positions.")
_position("{A, B}", "{last-item token, last token}", "Both in one run.")
_position(
    "tokens between",
    "tokens between first-item token and last token",
    "All tokens from one to the other, both included, in one run; `each token between …` sweeps.",
)
_position(
    "tokens except",
    "tokens except fruits tokens",
    "All others of the prompt's own text in one run; `each token except …` sweeps.",
)
_answer_position(
    "answer tokens",
    "answer tokens",
    "The tokens of the text that a measure reads, behind the prompt; also `answer token`, `first "
    "token of answer + 1`, `each token of answer`. A measure of several texts has passes of its "
    "own for each, and its tokens are those of the text there. The same text stands behind the "
    "prompts of all runs, so a patch goes from each of its tokens to the same one; means and "
    "resamplings are over rows, each with its own text. Where a prompt has a span called `answer`, "
    "that is meant.",
)
_answer_position(
    "and answer",
    "tokens * and answer",
    "The prompt and the answer behind it: `tokens *` is the prompt alone. `token * and answer` "
    "sweeps over both.",
)

# --- sites: how they are written; the components are in `sites.py` --------------------------------

_COORDINATES = "tests/execute/test_coordinates.py"

_site(
    "layer 0..2",
    "resid_post layer 0..2",
    "A sweep, one run per layer; both ends included.",
    _COORDINATES,
)
_site("layers 0..2", "resid_post layers 0..2", "All of them in one run.", _COORDINATES)
_site(
    "layer *",
    "layer * head *",
    "Every value there is. A head without a component is `z`, a neuron `mlp_hidden`.",
    _COORDINATES,
)
_site(
    "relative depth",
    "resid_post layer 25%..75%",
    "0% is the first layer and 100% the last, rounded half up; the table shows percentages.",
    "tests/elsewhere/test_models.py",
)
_site(
    "window",
    "resid_post layer * window 3",
    "One run per centre l, which joins the layers l − ⌊w/2⌋ to l + ⌈w/2⌉ − 1, cut at the ends.",
    _COORDINATES,
    TRACING,
)
_site(
    "short name",
    "L1H2",
    "Layer 1, head 2: its `z`. Also `L1H2.q`, `L3.mlp`, `L3.resid`, `L3N5`.",
    _COORDINATES,
)

# --- rules ----------------------------------------------------------------------------------------

_TRANSPLANTS = "tests/rules/test_transplants.py"
_OBSERVED = "tests/rules/test_observations.py"
_TOGETHER = "tests/rules/test_over_rows.py"
_TOKENS = "tests/rules/test_over_tokens.py"
_WEIGHTS = "tests/execute/test_observed_weights.py"
_WEIGHTS_IN_FILES = "tests/rules/test_weight_observations.py"
_EDGES = "tests/rules/test_attention.py"
_PATHS = "tests/rules/test_paths.py"

_rule(
    "patch",
    "patch layer * head * at last-item token",
    "The source run's vector is written into the base run, at the position of that name in each.",
    f"{TRACING}; {PATCHING}",
    "tests/execute/test_sites.py",
)
_rule(
    "patch … onto",
    "patch resid_post layer * at last-item token onto last token",
    "Read at the first position in the source run, written at the second in the base run. A sweep "
    "on both sides goes pair by pair.",
    SCOPES,
    _TRANSPLANTS,
)
_rule(
    "patch … into layer",
    "patch resid_post layer 1 at last token into layer *",
    "Read at the layers that the site names, written at these; several are an axis `to_layer`.",
    SCOPES,
    _TRANSPLANTS,
)
_rule(
    "patch … with RUN",
    "patch resid_post layer * at last token with other",
    "Another source for this rule alone.",
    PATCHING,
    _TRANSPLANTS,
)
_rule(
    "ablate with zero",
    "ablate layer * head * at last token with zero",
    "The vector becomes zero.",
    CIRCUIT,
    "tests/execute/test_sites.py",
)
_rule(
    "ablate with mean",
    "ablate layer * head * at last token with mean",
    "It becomes the mean at that position over the clean rows that `limit` and `keep` leave; "
    "`mean of fewer` takes another run, `mean of listed` another block of prompts with rows of its "
    "own, `mean of fruit.train` a part of a split, `mean by count` the rows of the same value.",
    CIRCUIT,
    "tests/execute/test_effects.py",
)
_rule(
    "ablate with resample",
    "ablate layer * head * at last token with resample",
    "It becomes that of another clean row of those that `limit` and `keep` leave, drawn once with "
    "the seed; with `resample of listed` that of a row of another block, drawn for each row by its "
    "content, with repetition.",
    CIRCUIT,
    "tests/execute/test_sites.py",
)
_rule(
    "replace",
    'replace last-item token with "plum"',
    "The text of these tokens is another one, before the model. A span that is named becomes it "
    "once: `fruits tokens` as a whole, `item tokens` every one, `each item tokens` one in each "
    "run. Beside other rules or positions it must have as many tokens.",
    OWN,
    "tests/execute/test_effects.py",
)
_rule(
    "swap",
    "swap resid_post layer * at first-item token with last-item token",
    "The base run's vectors at the two positions change places.",
    OWN,
    _TRANSPLANTS,
)
_rule(
    "freeze",
    "freeze mlp_out layers * at tokens *",
    "Holds the base run's own value while other rules change what comes before it.",
    MEDIATION,
    _TRANSPLANTS,
    beside="patch layer 0 head 1 at last-item token",
)
_rule(
    "set to a number",
    "set resid_post layer * at last token to 0.5",
    "Every component of the vector becomes this number; also a `param` or a `for` variable.",
    OWN,
    _TRANSPLANTS,
)
_rule(
    "set to a direction",
    "set resid_post layer 2 at last token to 2 * more",
    "The vector becomes the direction, times the number.",
    OWN,
    _STEERING,
)
_rule(
    "add",
    "add 4.0 * more to resid_post layer 2 at tokens *",
    "The direction, as long as it is (the conventions print its norm; `unit(more)` has length 1), "
    "times the number, which may be a `param` or a `for` variable. Like `scale`, `project out` and "
    "`clamp` it acts on what is there when the pass comes by, as a hook does: on what rules at "
    "sites below have left, and at one site on what rules before it in the file have left.",
    STEERING,
    _STEERING,
)
_rule(
    "scale",
    "scale attn_out layers * at last token by 0.5",
    "What is there is multiplied.",
    OWN,
    _STEERING,
)
_rule(
    "project out",
    "project out more from resid_post layer * at tokens *",
    "What is there loses its component along the direction: x − (x · u) u, u of length 1.",
    REFUSAL,
    _STEERING,
)
_rule(
    "project out of weights",
    "project out more from weights",
    "The direction is taken out of embeddings (those of positions too) and of what every attention "
    "and MLP adds, at all tokens: as if the weights that write into the residual stream couldn't "
    "write it. Refused for models with norms between these weights and the stream.",
    REFUSAL,
    _STEERING,
)
_rule(
    "clamp a neuron",
    "clamp mlp_hidden layer 2 neuron 5 at last token to 5",
    "The neuron has this value.",
    OWN,
    _STEERING,
)
_rule(
    "clamp along a direction",
    "clamp more of resid_post layer 2 at last token to 5",
    "The component along the direction, x · u with u of length 1, is set to the number; the rest "
    "stays.",
    OWN,
    _STEERING,
)
_rule(
    "a member of a family",
    "add by_layer[layer 1, token -1] to resid_post layer * at last token",
    "Coordinates are numbers, or variables of a `for` (`by_layer[layer l]`). Axes that aren't "
    "named "
    "stay. Without brackets, axes that the rule sweeps under the same name are shared (each layer "
    "with the direction of that layer), others become axes of the experiment.",
    OWN,
    _STEERING,
)
_rule(
    "the best member",
    "project out by_layer[best of select] from resid_post layer * at tokens *",
    "The one whose cell has the largest mean, signed, of the first measure of an experiment that "
    "sweeps the family.",
    REFUSAL,
    _STEERING,
)
_rule(
    "set in Python",
    'set resid_post layer * at last token to python("functions.py:halved")',
    "A function of a Python file is given the base run's vectors of one cell at a time, [rows, "
    "positions, width], and gives the same shape, which is written. Rows are those of the "
    "experiment that have the position, after `limit` and `keep`, in the order of the data; joined "
    "positions lie along the second dimension, and rows with fewer are filled up with NaN; joined "
    "heads or neurons lie side by side, and with several layers it is called once for each. What "
    "it gives hangs on no other cell, batch or pass. It runs with `--allow-python` only.",
    OWN,
    "tests/rules/test_whole_cells.py",
)
_rule(
    "set to what is elsewhere",
    "set resid_post layer 2 at last token "
    "to 0.5 * value(mlp_out layer 1 at last-item token) of fewer",
    "The vector of another site of an unpatched run, the base run where none is named, times a "
    "number if there is one; at the position that is written, where none is named. Both must be of "
    "one width.",
    OWN,
    "tests/rules/test_readings.py",
)
_rule(
    "add what is elsewhere",
    "add 0.3 * value(attn_out layer 1) of clean to resid_post layer 2 at last token",
    "The row's own vector of an unpatched run, the base run where none is named, times the number, "
    "is added to what is there when the pass comes by. Both must be of one width.",
    OWN,
    "tests/rules/test_readings.py",
)
_rule(
    "add steps",
    "add 2 * step(q) to q layer 1 head * at tokens *",
    "The vector minus that of the position before, times the number, is added: `token - 1` means "
    "the last token. Both are those of the running pass, as they are before this rule writes. "
    "The first position gets nothing. `q` is what is written; so are `k`, `v`, `z`, the stream and "
    "what is added to it. Rotary embeddings come behind `q` and `k`.",
    OWN,
    "tests/rules/test_steps.py",
)
_rule(
    "several fills",
    "ablate layer * head * at last token with zero, mean, mean of fewer by count, resample",
    "Fills in a list are an axis, `fill`, named as they are written: each cell is what the rule is "
    "with that fill alone.",
    OWN,
    "tests/rules/test_fills.py",
)
_rule(
    "block attention",
    "block attention layer * window 3 from last token to fruits tokens",
    "The queries may not attend to the keys: their scores are −∞ before the softmax, the rest, "
    "sinks included, is renormalised. Without a head axis all heads.",
    KNOCKOUT,
    _EDGES,
)
_rule(
    "reweight attention",
    "reweight attention layer * head * from last token to first-item token by 1.5",
    "The weight of the edge is multiplied, then the row is renormalised to 1; `by 0` is `block`.",
    OWN,
    _EDGES,
)
_rule(
    "set attention to a weight",
    "set attention layer * head * from last token to first-item token to 0.2",
    "Every visible edge gets this weight; the rest of the row is scaled so that it sums to 1. A "
    "query that sees no other key shares its row evenly among these.",
    OWN,
    _EDGES,
)
_rule(
    "set attention to uniform",
    "set attention layer * head * from last token to fruits tokens to uniform",
    "The weight that the visible keys have together is spread evenly over them.",
    OWN,
    _EDGES,
)
_rule(
    "allow attention",
    "allow attention layers * from first-item token to last-item token",
    "The queries see these keys too, later ones or those behind a window, with the scores that the "
    "model gives them; the softmax goes over all that is seen then. Other rules on edges act on "
    "the enlarged set. Rows are whole passes. Not where positions are added to scores (ALiBi).",
    "Wang et al. 2024, arXiv 2407.01100",
    "tests/rules/test_allowed.py",
)
_rule(
    "replace block",
    "replace block layer * with block layer 1",
    "Another block computes in that place, with its own weights on what enters there. Several, "
    "`layers 2..3`, are replaced together; a `for` may say `layer l with block layer l + 1`. Sites "
    "of a layer are what is computed in its place. Blocks of another kind can't stand in. Rows are "
    "whole passes.",
    OWN,
    "tests/rules/test_blocks.py",
)
_rule(
    "replace block with identity",
    "replace block layers 1..2 with identity",
    "The blocks hand on what enters them.",
    OWN,
    "tests/rules/test_blocks.py",
)
_rule(
    "renumber",
    "renumber last-item token from 5",
    "These tokens get the position ids 5, 6, …, in their order in the text; a prompt's first token "
    "has 0. All others keep theirs, and what a token sees goes by its place as before. Rows are "
    "whole passes. Not where the model counts by itself, or adds positions to scores.",
    "Wang et al. 2024, arXiv 2407.01100",
    "tests/rules/test_allowed.py",
)
_rule(
    "path",
    "path layer 0..1 head * -> q layer 2 head * at last token",
    "The sender gets the source run's value, every other head and every MLP is held at the base "
    "run's; what the receiver reads then is written into the base run. Receivers are `resid_pre`, "
    "`attn_norm`, `q`, `k`, `v`, `mlp_norm`, `mlp_hidden`, `final_norm` and `logits`; their axes "
    "are `to_layer`, `to_head` and `to_neuron`. Pairs in the wrong order are left out. Receivers "
    "of a group are patched at once. A neuron that receives gets the activation that its MLP gives "
    "it there.",
    PATHS,
    _PATHS,
)
_rule(
    "path beside rules",
    "ablate L1H2 at last token with zero  path layer 0 head * -> q layer 2 head * at last token",
    "The other rules make the model in which the path is patched: they act in the pass that gives "
    "what is held, in that in which the senders are patched, and in the last one. The source run "
    "that the senders' values are of is without them. A run with rules as the base "
    "(`from clean into ablated`) gives the same values, and effects against it. One path stands in "
    "an experiment.",
    PATHS,
    "tests/rules/test_paths_beside.py",
)
_rule(
    "path … with frozen norms",
    "path layer * head * -> logits at last token with frozen norms",
    "In the pass in which the senders are patched, every norm divides by what it divides by on the "
    "base run; so direct effects are linear, and those of senders that add up to the stream add up "
    "(before a cap on logits). Behind `through mlps`, where both stand.",
    "Elhage et al. 2021 (transformer-circuits.pub/2021/framework)",
    "tests/rules/test_paths_beside.py",
)
_rule(
    "path to neurons",
    "path layer 0 head * -> mlp_hidden layer 2 neurons 3, 7 at last token",
    "What the senders add to what these neurons read, and only these: their activations in the "
    "pass in which all else is held are written into the base run. Neurons send too: "
    "`path L0N3 -> L2N7`.",
    PATHS,
    "tests/rules/test_paths_beside.py",
)
_rule(
    "path … through mlps",
    "path layer * head * -> logits at last token through mlps",
    "MLPs recompute instead of being held. To `logits` or `final_norm` the measure is read off "
    "this very run.",
    PATHS,
    _PATHS,
)
_rule(
    "observe attention",
    "observe attention layer * head * from last token to first-item token",
    "The weight that the keys get together, averaged over the queries, and without a head axis "
    "over all heads; a measure `attention` with the effect `raw`, of the patched run where rules "
    "stand beside it.",
    ATTENTION,
    _EDGES,
)
_rule(
    "observe",
    "observe norm resid_post layer * at last token as lengths",
    "Looks and changes nothing: what is seen is measured, with the effect `raw`, of the patched "
    "run where rules stand beside it. With a name the line has a result of its own, with its own "
    "axes, beside that of the measures; `top 3 of lengths`, `expect max(lengths) > mean(attn)` and "
    "`report lines layer of lengths` call it. The name is one of the whole file: observations of "
    "two experiments have different ones. `norm` is the length of the vector (L2).",
    OWN,
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "measure OBSERVATION as delta",
    "patch layer 1 head 2 at last token "
    "observe entropy pattern layer 2 head * at last token as spread measure spread as delta",
    "What the rules change of what is observed: the base run is observed at the same places "
    "without them. Other effects than `raw` and `delta` aren't known of observations.",
    OWN,
    _OBSERVED,
)
_rule(
    "observe … of RUN",
    "observe norm resid_post layer * of fewer at last token as lengths",
    "Of another run than the one that rules act on, whose texts positions are found in.",
    OWN,
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "observe value",
    "observe value mlp_hidden layer 1 neuron 0..3 at last token",
    "The activation of one neuron; of neurons that are joined, their mean.",
    OWN,
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "observe entropy",
    "observe entropy pattern layer * head * at last token",
    "The entropy of what the query attends to, in nats.",
    OWN,
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "observe distance",
    "observe distance pattern layer * head * at last token",
    "How many tokens back the query attends, on average over its attention. `distance(8)` counts "
    "keys that are further back as 8 tokens back. In models that see both sides it is how far "
    "away keys are, and in images how many patches, from middle to middle.",
    OWN,
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "observe received",
    "observe received pattern layer * head * at each item token as paid",
    "How much attention each later token pays to this one, on average over all tokens behind it; "
    "`received(4..20)` is of those that lie 4 to 20 tokens behind it (future attention "
    "influence). Rows in which none lies there aren't part of the cell. In models that see both "
    "sides all other tokens pay.",
    "Li et al. 2025, arXiv 2510.13554",
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "observe logit_lens",
    "observe logit_lens resid_post layer * at last token",
    "The vector through the model's own final norm and unembedding, as if its layer were the last. "
    "Measures of the experiment read what comes out; without one, it is the probability of its "
    "most likely token. Of `attn_out`, `mlp_out` and `head_out` the norm has the scale of that "
    "vector alone.",
    'nostalgebraist 2020, "interpreting GPT: the logit lens"',
    _OBSERVED,
    "measure prob(answer) as raw",
)
_rule(
    "observe logit_lens … top",
    "observe logit_lens resid_post layer * at last token top 5",
    "Lists the five tokens of the largest mean probability over the rows of a cell, each with that "
    "and the share of rows in which it is the most likely one, in the table and the JSON "
    "(`listed`, `listed_mean`, `listed_first`). `tuned_lens` does so too.",
    OWN,
    _OBSERVED,
    "measure prob(answer) as raw",
)
_rule(
    "observe tuned_lens",
    'observe tuned_lens("lens.safetensors") resid_post layer * at last token',
    "As the logit lens, of h + A h + b: `layer.N.weight` [d_model, d_model] and `layer.N.bias` "
    "[d_model] of the file are A and b for `resid_post layer N`. The last layer needs none, and "
    "goes as it is then. The file's hash is kept with the results.",
    "Belrose et al. 2023, arXiv 2303.08112",
    _OBSERVED,
    "measure prob(answer) as raw",
)
_rule(
    "observe direct_logit",
    "observe direct_logit layer * head * toward answer - wrong at last token",
    "What a component adds to the logits behind `toward` by itself: through the final norm, whose "
    "scale is held at that of the stream, and the unembedding. Heads, `attn_out`, `mlp_out`, "
    "neurons, and `resid_pre layer 0` for the embeddings; with the biases of norm and unembedding, "
    "which no part has, all parts add up to the logit (before a cap on logits). Joined sites are "
    "added up.",
    "Elhage et al. 2021, transformer-circuits.pub/2021/framework; Wang et al. 2022, "
    "arXiv 2211.00593",
    _OBSERVED,
    "measure logit(answer) as raw",
)
_rule(
    "observe rollout",
    "observe rollout from last token to each item token as rolled",
    "What of the one token is mixed into the other by attention through all layers: the product "
    "over layers of (pattern averaged over heads + identity) / 2, each query's weights adding up "
    "to 1. Several tokens that it leads to are added up, those that it is looked at from averaged. "
    "Of images from `cls token`, or from `image tokens` where the model has none and pools its "
    "patches.",
    "Abnar and Zuidema 2020, arXiv 2005.00928",
    "tests/rules/test_rollout.py",
    "measure logit(answer) as raw",
)
_rule(
    "observe probe",
    "observe probe(count, folds: 5) at resid_post layer * at last-item token as told",
    "What a linear map of the vectors tells of a value, in rows that it wasn't fitted to: ridge "
    "regression (R²) of numbers and lists of numbers, logistic regression (share right) of texts, "
    "truths and two values; `kind: logistic` or `kind: ridge` says it. Rows that look alike at the "
    "position are in one fold. Beside it stands `told shuffled`, with the values dealt to other "
    "rows. `penalty` is that of Σ weights² on standardised vectors; without it, ridge takes the "
    "best of 0.01 to 10,000 on folds within the rows of each fit, logistic 1. `train: fruit.train` "
    "in place of `folds` fits it once, on another block, a part of a split or a run of it, at the "
    "same position; no row of the experiment may be among these.",
    "Alain and Bengio 2016, arXiv 1610.01644; Hewitt and Liang 2019, arXiv 1909.03368",
    _TOGETHER,
    "measure logit(answer) as raw",
)
_rule(
    "observe routed_probe",
    "observe routed_probe(count, folds: 5) at resid_post layer * at item tokens as told",
    "A probe of numbers, or of lists of numbers, that takes more from some tokens than from "
    "others: ridge regression on Σ softmax(x · query) x over the tokens of each row, one query for "
    "all rows, fitted with it from equal weights on. What a row's tokens hold says what is taken, "
    "so that it may be elsewhere in each row. R² in rows that it wasn't fitted to, as of a probe, "
    "whose `folds`, `train` and control it has; `penalty` is that of Σ weights² + Σ query² on "
    "standardised vectors and numbers, 1 unless it is said.",
    "Adeli, Sun and Kriegeskorte 2025, arXiv 2505.17329",
    _TOKENS,
    "measure logit(answer) as raw",
)
_rule(
    "observe routing",
    "observe routing(count, folds: 5) at resid_post layer 2 at each item token as looked",
    "How much such a probe takes from each token, by the fit that hasn't seen the row: a map, "
    "whose numbers add up to 1 over the tokens of the line.",
    "Adeli, Sun and Kriegeskorte 2025, arXiv 2505.17329",
    _TOKENS,
    "measure logit(answer) as raw",
)
_rule(
    "observe clusters",
    "observe clusters(4) resid_post layer 2 at each item token as concept",
    "How likely a token's vector is of each of four clusters, along an axis `cluster` from 1, the "
    "largest: k-means (the best of 5 starts, drawn by the seed) of the standardised vectors of all "
    "tokens of the line, whose clusters count as Gaussians of one variance. Joined tokens have "
    "their mean: what share of an image is of a cluster. `clusters(4, train: fruit.train)` fits it "
    "on other rows, as of a probe.",
    "Lloyd 1982, “Least squares quantization in PCM”; of patches: Wang, Tan and Wang 2024, "
    "arXiv 2406.12649",
    _TOKENS,
    "measure logit(answer) as raw",
)
_rule(
    "observe clusters … with RUN",
    "observe clusters(4) resid_post layer 2 with fewer at first-item token as kept",
    "Whether the likeliest cluster of a token is the same at the same place of another run.",
    OWN,
    _TOKENS,
    "measure logit(answer) as raw",
)
_rule(
    "observe similarity",
    "observe similarity resid_post layer * at first-item token with last-item token as alike",
    "The cosine of a row's vectors, the mean over pairs of different tokens, one at either "
    "position; without `with`, of the tokens of one position with each other.",
    OWN,
    _TOGETHER,
    "measure logit(answer) as raw",
)
_rule(
    "observe similarity … with SITE",
    "observe similarity resid_pre layer * with resid_post layer * at last token as alike",
    "The cosine of a row's vectors at two sites, one token at a time; the second site's axes are "
    "`to_layer`, `to_head`.",
    OWN,
    _TOGETHER,
    "measure logit(answer) as raw",
)
_rule(
    "observe similarity … with RUN",
    "observe similarity resid_post layer * of clean with fewer at last token as alike",
    "The cosine with the vector at the same position of another run, one token at a time; the run "
    "may be one with rules (`run healed { … }`), or another block.",
    OWN,
    _TOGETHER,
    "measure logit(answer) as raw",
)
_rule(
    "observe cka",
    "observe cka resid_post layer * with attn_out layer * at last token as alike",
    "Linear CKA of two sites over all distinct rows, by the estimator without bias for few rows; "
    "the second site's axes are `to_layer`, `to_head`; `with fewer` is of the same site in two "
    "runs. Its interval is that of the jackknife.",
    "Kornblith et al. 2019, arXiv 1905.00414; Song et al. 2012",
    _TOGETHER,
    "measure logit(answer) as raw",
)
_rule(
    "observe rank, effective_rank",
    "observe effective_rank resid_post layer * at last token as spread",
    "How many dimensions the rows' vectors take up around their mean: singular values above "
    "rounding (`rank`), or the exponential of their entropy. One number of all rows, without an "
    "interval.",
    "Roy and Vetterli 2007",
    _TOGETHER,
    "measure logit(answer) as raw",
)
_rule(
    "observe copying, matching",
    "observe copying layer * head * as copies",
    "Of a head's weights alone: Σ λ / Σ |λ| over the eigenvalues of embedding → OV → unembedding, "
    "or of embedding → QK ← embedding (`matching`), from −1 to 1. Gains of norms are folded in; "
    "their scales, biases and rotary are not. An experiment that looks at weights alone needs no "
    "`prompts` line.",
    "Elhage et al. 2021, transformer-circuits.pub/2021/framework",
    _WEIGHTS,
    "measure logit(answer) as raw",
)
_rule(
    "observe composition",
    "observe composition(q) at layer 0 head * with layer 1 head * as read",
    "How much of what a head writes a head of a later layer reads by its queries, keys (`k`) or "
    "values (`v`): ‖AB‖ / (‖A‖ ‖B‖), Frobenius, of the first one's OV and the other's QK or OV.",
    "Elhage et al. 2021, transformer-circuits.pub/2021/framework",
    _WEIGHTS,
    "measure logit(answer) as raw",
)
_rule(
    "observe singular_values",
    "observe singular_values(ov) at layer 0 head * top 5 as sizes",
    "The largest singular values of a head's W_V W_O, or of its W_Q W_Kᵀ (`qk`), along an axis "
    "`value` from 1; gains of norms are folded in.",
    "Millidge and Black 2022, “The singular value decompositions of transformer weight matrices "
    "are highly interpretable”",
    _WEIGHTS_IN_FILES,
    "measure logit(answer) as raw",
)
_rule(
    "observe value_vectors … top",
    "observe value_vectors layer 1 neuron 0..3 top 10 as says",
    "A neuron's output weights through the final norm's gain and the unembedding: what it adds to "
    "the logit of the token that it raises most, per unit of its activation. `top 10` lists the "
    "first ten tokens in the table and the JSON (`listed`).",
    "Geva et al. 2022, arXiv 2203.14680",
    _WEIGHTS_IN_FILES,
    "measure logit(answer) as raw",
)
_rule(
    "observe value_vectors … toward",
    "observe value_vectors layer 1 neuron * toward answer - wrong as writes",
    "What a neuron adds to the logits of each row's own tokens, per unit of its activation; the "
    "mean is over rows.",
    "Geva et al. 2022, arXiv 2203.14680",
    _WEIGHTS_IN_FILES,
    "measure logit(answer) as raw",
)
_rule(
    "observe successor",
    'observe successor(" 1", " 2", " 3") at layer 1 head * as counts',
    "The share of texts whose next one a head raises most of all that are listed, and beside it "
    "`counts rank`, its mean rank: token embedding → norm and MLP of the first block → OV → final "
    "norm's gain → unembedding. The first text again at the end closes a circle.",
    "Gould et al. 2023, arXiv 2312.09230",
    _WEIGHTS_IN_FILES,
    "measure logit(answer) as raw",
)
_rule(
    "for",
    "for l in 0..2 { patch attn_out layer l at last token patch mlp_out layer l at last token }",
    "An axis that several rules share. Also over numbers (`[0, 1, 4]`, `0%..100% step 5%`) and "
    "components (`[attn_out, mlp_out]`).",
    OWN,
    _COORDINATES,
)
_rule(
    "both ends",
    "for a in 0..2 { for b in a..2 { patch mlp_out layers a..b at last token } }",
    "Variables stand at either end of what is joined: `layers a..b`, `heads 0..a + 1`. A loop's "
    "values may hang on those around it (`a + 1..5`, `[a, 5]`, `a..1 step 0.1`): there are only "
    "the cells whose values go together, here six, and `heatmap a by b` is a triangle. A range "
    "that is empty for some of them is an error.",
    OWN,
    "tests/rules/test_nested_loops.py",
)
_rule(
    "window w",
    "for w in [1, 3] { patch mlp_out layer * window w at last token }",
    "How wide a window is, as an axis; each is cut at the ends.",
    OWN,
    "tests/rules/test_nested_loops.py",
)
_rule(
    "for i",
    "for i in 2..3 { block attention layers * from item i token to item i - 1 token }",
    "Its variable counts in positions: `item i token`, `item i + 1 token`, `token i`, `token -i`, "
    "`last token - i`, of rules, queries, keys and measures. With `from token i to token i - 11` "
    "they are those of a diagonal, one cell for each query. Rows without a position drop out of "
    "its cell, as of `each item token`, and n is told; that no row has it is an error.",
    OWN,
    "tests/rules/test_loop_positions.py",
)

# --- what another experiment found ----------------------------------------------------------------

_onward(
    "top n of",
    "patch top 3 of cie at last token",
    "The three cells of `cie` with the largest signed mean effect of its first measure, joined; "
    "`top 25% of cie` is a share of them. Where falls matter, as under an ablation, let `cie` "
    "measure the negative: `measure -logprob(answer) as delta`.",
    VECTORS,
    "tests/onward/test_sites.py",
)
_onward(
    "against random apart from",
    "patch L0H0 at last token against random(2) apart from L0H1, top 3 of cie",
    "Sites, groups and what another experiment ranked are never drawn as controls.",
    OWN,
    "tests/controls/test_apart.py",
)
_onward(
    "best of",
    "patch best of cie at last token",
    "The highest cell of `cie`, signed.",
    OWN,
    "tests/onward/test_sites.py",
)
_onward(
    "cells of",
    "patch top 3 of cie(layer: 1) at last token",
    "Only of the cells of `cie` that have these values along its axes: numbers, words in quotes "
    '(`base: "fewer"`), a `param` or a `for` variable. So each cell of a loop may have the order '
    "of tokens of its own map: `for a in 0..3 { for b in a..3 { for k in 0%..100% step 10% { patch "
    "embed at top k of ranges(a: a, b: b) tokens } } }`. Maps are named alike: `observe pointing "
    "of ranges(a: 1, b: 3), deleted in object`.",
    OWN,
    "tests/onward/test_some_cells.py",
)
_onward(
    "heads of edges",
    "reweight attention top 3 of cie from last token to first-item token by 1.5",
    "The heads that `cie` ranks highest, joined, in place of layers and heads; so may a `group` "
    "stand there. Sites of heads stand for their heads: `L1H0` (that is `z`) and `L1H0.q` are the "
    "same one, `k` and `v` all heads that read them.",
    OWN,
    "tests/onward/test_heads.py",
)
_onward(
    "receivers of heads",
    "path layer 0 head * -> q of top 2 of cie at last token",
    "Paths end where these heads read their queries, joined (`k`, `v`: those of their key-value "
    "heads). Of a group: `-> q counters`.",
    PATHS,
    "tests/onward/test_heads.py",
)
_onward(
    "top n% of … tokens",
    "ablate embed at top 25% of places tokens with zero",
    "In every row the tokens that `places`, which sweeps tokens, ranks highest in this row; "
    "signed, as above; of equal ones the earlier.",
    DELETION,
    "tests/onward/test_tokens.py",
)
_onward(
    "tokens of an observation",
    "ablate embed at top 2 of look tokens with zero",
    "In every row the keys that the observation `look` ranks highest in this row: the keys of "
    "`observe attention … to each …`, or the positions that another one sweeps. Several in one "
    "experiment have names: `as attn`, then `top 2 of attn tokens`.",
    OWN,
    "tests/onward/test_observed_tokens.py",
)
_onward(
    "curve",
    "for k in 0%..100% step 25% { ablate embed at top k of places tokens with zero }",
    "More and more of them: an axis of percentages.",
    DELETION,
    "tests/onward/test_curves.py",
)
_onward(
    "for over experiments",
    "for m in [places, look] { ablate embed at top 2 of m tokens with zero }",
    "A `for` over words may be over experiments and observations of the file, in the order of "
    "which tokens or sites are taken: an axis whose cells are of the same rows. Of an experiment "
    "with several maps, each is a value: `for m in [ranges(a: 1, b: 3), places]`.",
    OWN,
    "tests/images/test_maps.py",
)

# --- experiments ----------------------------------------------------------------------------------

_experiment(
    "model line",
    "model toy",
    "What the experiment runs on; may be left out where the file has one model.",
    _LOWER,
)
_experiment(
    "several models",
    "model toy, twin",
    "Runs on each, an axis `model`.",
    "tests/elsewhere/test_models.py",
)
_experiment(
    "prompts line",
    "prompts fruit limit 16",
    "The block whose rows are sampled and whose texts the measures read; `limit` takes the first "
    "16 of one seeded permutation. `fruit.train` and `fruit.test` are the parts of a `split`.",
    "tests/execute/test_effects.py",
)
_experiment(
    "several blocks",
    "prompts fruit, listed limit 16",
    "An axis, `prompts`: the experiment on each block, or part of one (`fruit.train, fruit.test`), "
    "`limit` rows of each. Texts, runs and positions are the block's own. Cells of two blocks have "
    "no rows in common: for a difference of them each block's rows are drawn by themselves.",
    "tests/elsewhere/test_several_blocks.py",
)
_experiment(
    "a run with rules",
    "run healed { from fewer into clean  patch resid_post layer 1 at last token }",
    "Defines a run by rules, within the experiment: wherever a run is named, `healed` is that run, "
    "as in `from healed into clean`, `from clean into healed`, `patch … with healed`, "
    "`kl(healed)`, `accuracy(healed)`, `mean of healed`, `observe … of healed`, `save … of "
    "healed`. Its rules have one cell, all in one pass; without `from` they act on the clean run. "
    "What they write stays in place where other rules act on it, which act behind them. A run may "
    "use those before it. Rows that start there are whole passes. All rules may stand in it but "
    "`path` and `replace POSITIONS with TEXT`; a Python function is given all rows that are kept.",
    "tests/rules/test_derived_runs.py",
    "McGrath et al. 2023 (arXiv 2307.15771)",
    beside="expect accuracy(healed) > 0",
)
_experiment(
    "save",
    'save resid_post layer * of clean at last token to "acts.safetensors" as float16',
    "Writes activations to a safetensors file while batches run, so that it may be larger than "
    "memory; `of RUN` behind the site takes another run than the base run, also one with rules. A "
    "tensor for each site, `resid_post.layer3`, [vectors, width], all heads or neurons side by "
    "side where none is named; with it `row`, `token` and `position` (a number in the list "
    "`positions` of the metadata), and beside the file `acts.jsonl` with the rows' numbers, texts, "
    "tokens and values. `safetensors.torch.load_file` reads it. Without `as` numbers are as "
    "computed. An experiment may consist of it. Beside rules the run is named; beside `keep` it is "
    "refused. Each run writes the file again.",
    "tests/execute/test_save.py",
)
_experiment(
    "from … into",
    "from clean into fewer",
    "Source run and base run: rules act on the base run, and `patch` reads the source. Effects "
    "are 0 at the base and 1 at the source.",
    "tests/execute/test_effects.py",
    PATCHING,
)
_experiment(
    "several sources or bases",
    "from clean, other into fewer",
    "Every combination is run, axes `source` and `base`; effects are against that combination's "
    "own runs.",
    "tests/elsewhere/test_variants.py",
)
_experiment(
    "from block into block",
    "from fruit into blank",
    "Runs of two blocks. Rows are paired by their number, or the one row of a block serves all of "
    "the other.",
    "tests/elsewhere/test_blocks.py",
    SCOPES,
    beside="patch resid_post layer * at last-item token onto last token",
)
_experiment(
    "from block shuffled into block",
    "from fruit shuffled into listed",
    "Rows are dealt to each other by a seeded shuffle, each once. Where both blocks run over the "
    "same values, pairs by number are equal in them, and nothing shows which run is heard (W0704).",
    "tests/elsewhere/test_shuffled_blocks.py",
    beside="patch resid_post layer * at last-item token",
)
_experiment(
    "from model into model",
    "from twin into toy",
    "Activations of one model are written into another of the same shape.",
    "tests/elsewhere/test_models.py",
    ACROSS,
)
_experiment(
    "keep",
    "keep correct",
    "Only rows of which this holds in the clean run; kept and dropped are printed.",
    "tests/execute/test_effects.py",
)
_experiment(
    "against random",
    "against random(3)",
    "The same rules on matched random targets, all different, drawn once with the seed: beside the "
    "effect the range of the draws, how likely one more lies in it, and the effect's rank among "
    "them. `random(20, positions)` says what is drawn.",
    "tests/controls/test_controls.py",
)
for _estimator in dict(ESTIMATORS.items()).values():
    _experiment(
        f"using {_estimator.name}",
        _estimator.example,
        _estimator.documentation,
        "tests/rules/test_gradient_attention.py"
        if _estimator.place == "attention"
        else "tests/rules/test_estimates.py",
        _estimator.source,
        beside="" if _estimator.is_effect else "measure logit(answer) as raw",
    )
_experiment(
    "generate",
    'generate 8 until "Part", "Total"',
    "Each row of each cell, and of the base and the source run, writes up to 8 tokens behind its "
    "prompt, each time the most likely one. A reply ends in front of a text behind `until`, and in "
    "front of the model's own end of a text; neither is a part of it. Step 0, the prefill, is the "
    "pass over the prompt, which predicts the first token; step s has the reply's token s as the "
    "newest one. Rules act at each step, as long as they say nothing else: in the prefill at their "
    "positions; `last token` and `tokens *` then go on to the newest token, where a rule writes "
    "what it writes at the prompt's last one (scaling, projecting, clamping and adding act on what "
    "is there then). Metrics that read logits stay those of the prompt's last token. Not beside "
    "`path`, and not for base and source runs with rules.",
    _REPLIES,
)
_experiment(
    "python of reply",
    'measure python("functions.py:words", reply) as raw',
    "A function of a Python file, called as `words(replies, rows)` with the texts that were "
    "written, without what ended them, in place of logits; as a third argument, or one called "
    "`tokenizer`, it is given the model's.",
    "tests/python_files/test_replies.py",
    OWN,
    "generate 8",
)
_experiment(
    "generate with",
    "generate 8 with temperature 0.7, top_k 50, top_p 0.9, samples 3",
    "Tokens are drawn: from the 50 most likely tokens, of the fewest that have 0.9 of the "
    "probability, at a temperature (1 where it isn't said). A measure of a row is the mean over "
    "its samples. Only in a file with a `seed`: what is drawn hangs on it, on what is in the "
    "row, on the cell, the sample and the step, and not on the place in a batch.",
    "tests/execute/test_kept_replies.py",
)
_rule(
    "during",
    "patch resid_post layer 1 at last token during step 2..5",
    "The rule acts in these steps of a reply, both ends included; `during prefill` in step 0 "
    "alone, `during each step` says what holds without it. Steps behind the prefill have their "
    "newest token only, so other positions than `last token` and `tokens *` take `during prefill` "
    "or nothing. `for s in 0..7 { … during step s }`, or `during step s..s + 2`, makes steps an "
    "axis. `pattern`, `scores`, `allow` and `renumber` go no further than the prefill.",
    OWN,
    _REPLIES,
    "generate 8",
)
_rule(
    "after prefill",
    "patch k layers * at last-item token with clean after prefill",
    "Edits the keys or values that are kept of the prompt, between the prefill and the first step: "
    "the first token of the reply is predicted without it, later ones attend to it.",
    OWN,
    _REPLIES,
    "generate 8",
)
_experiment(
    "positions in a reply",
    "measure entropy at each step as raw",
    "Measures and observations read tokens of the reply too: `each step` (where token s + 1 is "
    "predicted, along the axis `step`; step 0 is the prompt's last token), `each reply token`, "
    '`reply token 3`, `first token of reply`, `last token of reply`, `"Answer:" of reply token` '
    "(the last token of its last occurrence), and `observe attention … from each reply token to "
    "subject tokens`. They are read in whole passes over prompt and reply, in which rules act "
    "where they acted. Rows whose reply has no such token leave the cell. `delta`, and `kl(RUN)`, "
    "are set against the base run, or that run, behind the same reply without rules. Other "
    "effects, texts of several tokens and what is made of all rows aren't known there. `save` "
    "writes vectors at these tokens of what a run without rules writes, of each sample.",
    "tests/rules/test_in_replies.py",
    beside="generate 8",
)
_experiment(
    "replies behind prompts",
    "prompts fruit limit 4 with replies of writer",
    "Behind each prompt stands what `writer`, another experiment with `generate`, wrote there: the "
    "same tokens in all runs, whatever their text would be tokenised to. With rules it is what its "
    "one cell wrote, or the one that is named: `replies of writer(c: 1)`. `last token` is the "
    "reply's, and answers are read behind it. Rules, measures, observations and `save` name its "
    "tokens in the words above: `patch resid_post layer * at each reply token`. Rows without a "
    "reply there are left out, and said; `writer` runs first, on the same block, and with a model "
    "of the same tokenizer.",
    "tests/rules/test_written_text.py",
)
_experiment(
    "measure",
    "measure prob(answer) at last-item token as delta",
    "A metric, the position that it is read at (the last token where there is none) and the "
    "effect. Metrics are expressions of the metrics below. Two that differ by the position alone "
    "have it in their names: `prob(answer) at item 1 token`.",
    "tests/execute/test_metrics.py",
)
_experiment(
    "answers that differ by row",
    "measure prob(count + 1..12) as raw",
    "The bounds of numerals are worked out in each row (greater-than: `prob(label + 1..99, "
    "digits: 2)`), and so are lists: `prob([count, count + 2])`, `expected(around)` where `around` "
    "is a value that is a list. Numerals are spelt as in `answer`, with as many `digits` as are "
    "asked for; a row without any is an error. The variable of a `for` may be part of them "
    '(`prob(label + i..99)`) and of texts (`logit(" {i}")`); a value of the rows that is called '
    "like it goes first.",
    "tests/execute/test_metrics.py",
    "Hanna et al. 2023, arXiv 2305.00586",
)
_experiment(
    "any of several answers",
    "measure correct(answer, answer of fewer) as raw",
    "`correct`, `prob`, `logprob` and `rank` take several texts of one token each: whether the "
    "best token is one of them, the sum of their probabilities, its logarithm, the best rank. A "
    'value that is a list stands for its entries: `accepted = list(" {alias}", from: aliases)`, '
    "then `correct(accepted)`, and where these have several tokens, "
    "`correct(first token of accepted)`. Equal tokens count once.",
    "tests/execute/test_metrics.py",
)
_experiment(
    "measure at each",
    "measure entropy at each item token as raw",
    "Read at each of several places, an axis `measured` (`item` for occurrences); all measures of "
    "an experiment are read at the same ones. Rows that lack a place drop out of it. "
    "`{item.index}` in a text is the number of the occurrence that is measured.",
    "tests/execute/test_measured_places.py",
)
_experiment(
    "loss at each",
    "measure loss at token * align right as raw",
    "The loss of the token that stands at a place, each run's own, read where it is predicted; the "
    "first token of an input has none.",
    "tests/execute/test_measured_places.py",
)
_experiment(
    "mean over",
    "measure entropy at each item token as raw mean over item",
    "Averaged over an axis, in each row over the cells that it is part of, before statistics: "
    "intervals and p are of the means. All measures of an experiment are averaged alike.",
    "tests/execute/test_averaged.py",
)
_experiment(
    "auc over",
    "measure prob(answer) as raw auc over k",
    "The area under each row's curve over an axis of numbers, by trapezoids and divided by the "
    "range, in place of a mean: a number of each row, with an interval over rows, and paired where "
    'areas are compared (`expect raw(m: "caap") - raw(m: "chance") > 0`). Insertion and '
    "deletion of images are `patch embed at top k of caap tokens` in a `for k`, `from scenes into "
    "neutral` and `from neutral into scenes`; `report lines k` draws the curve where the axis "
    "stays.",
    "tests/images/test_maps.py",
    DELETION,
    beside="for k in 0%..100% step 25% { ablate embed at top k of places tokens with zero }",
)
_experiment(
    "loop in measure",
    "for l in 0..2 { ablate mlp_out layer l at last token with zero "
    "measure cosine(resid_post layer l, clean) at last token as raw }",
    "Measures may name a loop's variable, in sites and positions (`at token l`): they are read in "
    "the cells of that value. `cosine(resid_post layer *, clean)` is a sweep of its own.",
    "tests/execute/test_measured_places.py",
)
_experiment(
    "stats",
    "stats bootstrap(2000) test flips confidence 90% correct bh verdicts holm by count",
    "Overrides resampling, where intervals and p come from (`t`, Student's t corrected for "
    "skewness, where nothing is said; `flips` of signs; `bootstrap`), confidence and the "
    "correction for many cells (`holm`, `bh`, `max` for the max-statistic, `none`). With `verdicts "
    "holm` the `expect` lines of an experiment share one level; `by` takes all rows of one value "
    "for one draw: intervals and p are about new values then, not about new "
    "rows. W0722 says where one value explains most of what rows differ by. All figures: "
    "`docs/statistics.md`.",
    "tests/results/test_statistics.py",
)
_experiment(
    "report",
    "report table top 10",
    "Shows the results; its kinds are below. `top n` ranks by absolute value, and says that its "
    "rows were picked by what they show.",
    "tests/results/test_reports.py",
)

# --- classifiers ----------------------------------------------------------------------------------

_class(
    "class of the answer",
    "measure prob(class answer) as raw",
    "The label that the answer names, as the config has it (`id2label`); on a classifier texts are "
    "names of labels and no tokens. A text that is a number is that of an output where labels have "
    "no names of their own (`LABEL_0`), and so is an answer `token_id(column)` always. Token "
    "classifiers are read at a position; those of prompts have one output, made of token 0 "
    "(encoders) or of the last one that isn't the pad token (decoders).",
)
_class(
    "class by its name",
    'measure logit(class "positive") - logit(class "negative") as raw',
    "Labels by their names.",
)
_class(
    "class by its number",
    "measure logit(class 2) as raw",
    "An output by its number, from 0; also of a language model from Python that has others than "
    "its tokens, which no config says.",
)
_class(
    "correct of a label",
    "measure correct as raw",
    "Whether the answer is the best label, or, of labels that hold or not each by itself "
    "(`multi_label_classification`), whether its probability is over 0.5.",
)

# --- expectations ---------------------------------------------------------------------------------

_expectation(
    "expect",
    "expect max(delta) > 0.3",
    "Must hold on the near end of the confidence interval; the exit status says whether all do.",
)
_expectation("expect on mean", "expect max(delta) > 0.3 on mean", "Must hold for the mean alone.")
_expectation(
    "expect of a cell", "expect delta(L1H2) < 0.1", "The effect of the cell with these coordinates."
)
_expectation("expect mean", "expect mean(delta, layer 0..1) < 0.05", "The mean over cells.")
_expectation("expect argmax", "expect argmax(delta) = L1H2", "Which cell is the highest.")
_expectation(
    "expect top n contains",
    "expect top 5 contains L1H2, L0H1",
    "Whether these are among the cells with the largest absolute effects.",
)
_expectation(
    "expect accuracy",
    "expect accuracy(clean) > 0.9",
    "The share of rows whose answer is the most likely token, in an unpatched run: of all rows, "
    "also of those that `keep` drops.",
    "tests/execute/test_accuracies.py",
)
_expectation(
    "expect accuracy of a model",
    "expect accuracy(clean, model: toy) > 0.9",
    "The same where the experiment runs on several models: each has one of its own.",
    "tests/execute/test_accuracies.py",
    beside="model toy, twin",
)
_expectation(
    "expect pearson",
    "expect pearson(delta, cie) > 0.5",
    "The correlation of the true effects with those of another experiment, over the cells that "
    "both have: what the noise of the rows adds or takes off is taken out. `spearman`, of ranks, "
    "has no interval and needs `on mean`.",
)
_expectation(
    "expect of another experiment",
    "expect max(delta) - max(delta of cie) < 1",
    "A measure of another experiment of the file, which may come later. `delta of ld of cie` where "
    "several fit; cells are named by the axes of that experiment (`mean(delta of cie, layer 2)`). "
    "Where a measure is called as the experiment is, the measure is meant.",
    "tests/results/test_what_expectations_name.py",
)
_expectation(
    "expect auroc",
    "expect auroc(delta, [L1H2, L0H1]) > 0.5",
    "How well an effect ranks cells: the share of pairs of a cell that is true and one that isn't "
    "in which the true one has the larger effect. What is true is a `group` of sites, a list, or a "
    "site; all other cells are not, of those that further arguments choose (`layer 0..1`). With a "
    "variable of the prompts that is 0 or 1, as in `auroc(delta, large, L1H2)`, the rows of one "
    "cell are ranked.",
    "tests/results/test_what_expectations_name.py",
)
_expectation(
    "expect near",
    'expect delta(L1H2) near -0.67 within 0.5 citing "a paper"',
    "Within a distance of a published value.",
)
_expectation(
    "expect auc",
    "expect auc(prob, k) < 0.4",
    "The area under the curve of a measure over an axis of numbers (trapezoids), divided by the "
    "axis's range.",
    "tests/onward/test_curves.py",
    DELETION,
    beside="for k in 0%..100% step 25% { ablate embed at top k of places tokens with zero } "
    "measure prob(answer) as raw",
)

# --- images ---------------------------------------------------------------------------------------

_image(
    "images block",
    'images circles { kind in ["circle"] image shapes(n: 1, kind: kind) answer "{kind}" }',
    "Rows that are images, for vision transformers. Values, `rows`, `rename`, `where`, `split`, "
    "`answer` and other texts, and corruptions of values are those of a `prompts` block; texts are "
    "names of labels. Each image is made ready by the model's image processor "
    "(`preprocessor_config.json`).",
)
_image(
    "image file",
    'image "{kind}.png"',
    "A file, its path relative to the `.mech` file: PNG, JPEG, WebP or BMP. Upright, in RGB, "
    "transparent parts on white. A record may have several: a corruption names another, "
    '`corrupt other { file = second }` where the image is `"{file}"`, and so one goes into the '
    "other.",
    "tests/images/test_pixels.py",
)
_image(
    "image shapes",
    "image shapes(n: 1, kind: kind, size: 32)",
    "Shapes at random places on a texture: `n` of them (1), of a `kind`, in a square of `size` "
    "pixels (32); with `colour:` and `texture:` these aren't drawn. Each row is drawn by itself, "
    "so that a `limit` takes more rows than there are combinations; a corruption of a value keeps "
    "the draw.",
)
_image(
    "image gray",
    "image gray",
    "All pixels 128 of 255; `gray(100)` is darker.",
    "tests/images/test_pixels.py",
)
_image(
    "image noise",
    "image noise",
    "Every number of every pixel drawn by itself, of the size that the model reads.",
    "tests/images/test_pixels.py",
)
_image(
    "image mean",
    "image mean of scenes",
    "The mean, number by number, of the images of another block, or of `scenes.train`: of all its "
    "rows before any `limit` (of images that are drawn 1,000), as the model gets them.",
    "tests/images/test_means.py",
)
_image(
    "region",
    "region object = mask",
    "A part of each image as a span: `object tokens` are the patches with a pixel, as the model "
    "gets it, of which half or more lies in it. Of shapes that are drawn `mask` is where they lie; "
    "else a column has a box, `[left, top, right, bottom]` in pixels of the file, a list of boxes, "
    "or the path of an image of the same size that isn't black there. They go through resizing and "
    "cropping with the image.",
    "tests/images/test_regions.py",
)
_image(
    "tiles",
    "tiles 2 by 3 and whole",
    "Each image is cut into two rows and three columns of tiles, each of which is a row of the "
    "block, with the values and texts of its image; with `and whole` the uncut image is one more. "
    "It is cut as it is opened and as a corruption leaves it (a blur crosses edges, noise and "
    "shapes are drawn once for all tiles), in front of the processor's resizing and cropping. "
    "Edges between two pixels go to the left and to the top. Each row has the values `tile` "
    '(`"row 1 col 2"`, `"whole"`) and `image`: `where tile != "whole"`, `corrupt seen { tile = '
    '"whole" }` (another tile of the same image), `report table by tile`. Of a region, a tile has '
    "the part that lies in it; cells at `object tokens` are of the tiles that have a part of it. "
    "Tiles of one image are no independent rows: `stats by image` holds where nothing else is "
    "said, they are in one part of a split and one fold of a probe, and a `limit` takes one image "
    "after the other. Rows of another block go by tile and image, where that is cut alike; a block "
    "of one image is the other side of every tile. For gray, noise and means there are none.",
    "tests/images/test_tiles.py",
)
_image(
    "transplants of images",
    "from scenes into neutral",
    "A block of one row is the other side of every row: each image's vectors go into the one gray "
    "image. Where that has no regions, `object tokens` are where each image has them.",
    "tests/images/test_rules.py",
)
_image(
    "label of an answer",
    "measure logit(answer) as delta",
    "Of images, a text names a label (`id2label`): `logit(class answer)` is the same.",
)
_image(
    "scores of texts",
    'measure score("a photo of a {kind}") as delta',
    "Of a model with a tower for images and one for texts (CLIP, SigLIP, MetaCLIP 2): its own "
    "logit of the image and a text, the cosine of what both become, times the model's scale, plus "
    "its bias if it has one. `score(answer)` is of the row's text; `logit(…)` is the same. Rules "
    "act in the image tower, whose layers may be written `vision layer 3`; each text is encoded "
    "once, as it is, padded as the model's processor does.",
    "tests/images/test_towers.py",
    "Radford et al. 2021, arXiv 2103.00020; Zhai et al. 2023, arXiv 2303.15343",
)
_image(
    "zero-shot classes",
    'classes "a photo of a {kind}"',
    "The texts that such a model chooses from: with all values of the names in it, declared ones "
    "and those of columns, whichever rows are run. `correct`, `rank` and `accuracy` are among "
    "them; `prob` is their softmax, or of SigLIP the sigmoid of one text, which needs no classes.",
    "tests/images/test_towers.py",
)
_image(
    "images for texts",
    "image from scenes",
    "In a block of `prompts`, for such a model: its text tower reads the rows, and rules act there "
    "(`text layer 3` says so); each text is scored with the image of the same row of `scenes`, or "
    "with its only one. `score` alone is of that image, and `rank(image)`, `prob(image)` and "
    "`correct` are among all images of the block.",
    "tests/images/test_text_towers.py",
)
_in_image(
    "a patch",
    "image row 3 col 4 token",
    "The token of a patch; rows and columns count from 1, from the top left.",
)
_on_image(
    "a patch in an expectation",
    'expect delta(position: "image row 3 col 4") < 1',
    "The effect at a patch, as tables call it.",
    OWN,
    "tests/images/test_blocks.py",
)
_in_image(
    "several patches",
    "image row 1..2 col * tokens",
    "A rectangle of patches, joined; with `token` one run for each.",
)
_on_image(
    "windows of patches",
    "for r in 1..3 { ablate embed at image row r..r + 1 col 2 tokens with zero }",
    "A window that moves: the ends of both ranges may be a `for` variable, or a number more or "
    "less.",
    OWN,
    "tests/images/test_rules.py",
)
_in_image(
    "all patches",
    "image tokens",
    "All patches, joined.",
)
_in_image(
    "each patch",
    "each token of image",
    "One run for each patch, called by its row and column.",
)
_in_image(
    "class token",
    "cls token",
    "The class token in front of the patches. There may be a `distillation token` and registers "
    "behind it (`register 2 token`, `each register token`): they are in `tokens *`, and `first "
    "token` is the first patch.",
)

# --- experiments on images ------------------------------------------------------------------------

_MAPS = "tests/images/test_maps.py"
_on_image(
    "observe pointing",
    "observe pointing of caap, deleted in object",
    "Whether a map is highest in the region: in a patch of which half or more lies in it; of "
    "several that are highest, the share. Maps are experiments of the file that sweep patches "
    "(`at each token of image`), each by its first measure in the same row, signed; several are an "
    "axis `map`, and of one, its other axes are axes here too (`for a in … { for b in … }`: one "
    "value for each range of layers). The region is that of the block, in pixels of the image as "
    "the model gets it; rows without it drop out, which is said. Beside it stands `pointing "
    "chance`, the share of patches that lie in it.",
    "Zhang et al. 2018, Top-down neural attention by excitation backprop",
    _MAPS,
)
_on_image(
    "observe mass",
    "observe mass of caap in object as inside",
    "Which share of what is above 0 in a map lies in the region; a patch that is partly in it "
    "counts by its share of pixels. Beside it stands the region's share of the image.",
    "Arras et al. 2022, arXiv 2003.07258",
    _MAPS,
)
_on_image(
    "observe iou",
    "observe iou of caap in object top 25%",
    "Pixels that both the region and the highest patches have, over those that either has. Without "
    "`top`, as many patches as the region's share of the image.",
    OWN,
    _MAPS,
)
_on_image(
    "map of windows",
    "for r in 1..3 { replace image row r..r + 1 col * tokens with gray }",
    "A window of several patches that moves makes a map too, where maps are named: its number is "
    "shared evenly among its patches, and a patch that several windows have gets the mean of its "
    "shares.",
    OWN,
    "tests/images/test_sum_of_maps.py",
)
_on_image(
    "observe sum",
    "observe sum of caap, 0.5 * deleted at each token of image as both",
    "One map of several, patch by patch added up, each times the number in front of it: of windows "
    "of several sizes, say, or of layers. The number may be worked out, of a `param` or a `for` "
    "variable: `(1 - c) * deleted`. Of an experiment that has several maps (one for each "
    "layer) all are added. It is a map as others are: `observe pointing of both in object`, `top "
    "25% of both tokens`. A patch that one of them has no number of has none, and rows that one of "
    "them lacks drop out, which is said.",
    OWN,
    "tests/images/test_sum_of_maps.py",
)
_on_image(
    "observe random",
    "observe random embed at each token of image as chance",
    "A number drawn for each row and position, even between 0 and 1: a map that knows nothing, and "
    "an order of tokens that is random. It hangs on the seed, the image or text that is looked at, "
    "and the position; so look at the images themselves, not at a neutral one that all rows have. "
    "`random(20)` draws twenty, an axis `draw`, for random sets of patches: `for d in 1..20 { "
    "replace top 8 of chance(draw: d) tokens with gray }`.",
    OWN,
    _MAPS,
)
_AGAINST = "tests/images/test_maps_to_others.py"
_on_image(
    "observe infidelity",
    "observe infidelity of caap, deleted to taken as wrong",
    "How far the sum of a map over a set of patches is from how far the output falls without them, "
    "squared, the mean over sets. The sets and the falls are those of `taken`, an experiment that "
    "takes patches out of the images (`replace`, `ablate`, `patch`) and measures `as delta`; each "
    "of its cells is a set. As a map has no scale of its own, it is multiplied, in each row, with "
    "the number that makes this least, and with no negative one: what says the opposite is worth "
    "no more than zeros. Beside it stands `wrong chance`, what a map has that is the same "
    "everywhere: of sets that are equally large it tells how far the output falls on average.",
    "Yeh et al. 2019, arXiv 1901.09392, definition 2.1 and the optimal scaling of its section 2",
    _AGAINST,
)
_on_image(
    "observe sensitivity",
    "observe sensitivity of caap to near_caap as moves",
    "How far a map moves where its image moves little: the largest ‖map of an image nearby − map‖ "
    "/ ‖map‖. `near_caap` is the same experiment on other runs, one or several (`from near_1, "
    "near_2 into neutral`, with `corrupt near_1 { noise image by 4 }` in the block; each of these "
    "has noise of its own). Of several maps there are as many behind `to`, in their order.",
    "Yeh et al. 2019, arXiv 1901.09392, max-sensitivity, which isn't divided there",
    _AGAINST,
)
_on_image(
    "replace patches",
    "replace each token of image with gray",
    "Occlusion: patches are painted in the image as the model gets it, before it is normalised: "
    "`gray` (128 of 255), `blur(4)` (a Gaussian of this radius in pixels), `noise(40)` (normal "
    "noise of this standard deviation of 255, drawn for each row). Rectangles and regions go "
    "together: `replace image row 3..5 col 2..4 tokens with gray`, `replace object tokens with "
    "blur(4)`. `patch embed at each token of image` pastes a patch of the other image: what the "
    "model reads of it, in front of position embeddings.",
    "Zeiler and Fergus 2014, arXiv 1311.2901",
    "tests/images/test_replace.py",
)
