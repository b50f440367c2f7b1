"""Each planner pass alone, all passes but one, and all passes equal the plain executor.

Files are random: one to three experiments on prompts of different lengths, each with one or two
rules and one or two metrics, and execution options. A rule has any site, single or joined over
layers, heads, neurons and windows, any type of position, and any fill; a second rule has no axis.
Fixed examples precede the random ones: one for each site, in which families, fills, positions,
directions and metrics take turns. So all of them occur for any seed, and each property asserts it.
The property of a single pass has only every ninth fixed example, unless many files are sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mechdsl.execute.run.panel import Execution
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.models.shape import unit_count
from mechdsl.vocab.sites import SITES

from .support import (
    ABSOLUTE,
    EVERY_PASS,
    PROMPTS,
    RELATIVE,
    SMALL,
    adopted,
    check_file,
    execute_file,
    experiment,
    write_rows,
)

FAMILIES = ("gpt2", "llama", "mistral", "qwen3", "gpt_neox", "gpt_neox_sequential")
"""Learned and rotary positions, shared key-value heads, a window of 3 tokens, norms of queries and
keys, attention beside the MLP and before it."""
NOISED = PROMPTS.replace(
    "corrupt turned",
    """corrupt noised { add gaussian(std: 1, samples: 2) to embed at subject tokens }
  corrupt turned""",
)

# Parts of a rule: words of the language, by the feature that they cover.
WHOLE = ("resid_pre", "resid_mid", "resid_post", "attn_norm", "mlp_norm", "attn_out", "mlp_out")
HEADS = ("q", "k", "v", "z", "head_out")
ALONE = ("embed", "final_norm", "logits")
EVERY_SITE = (*WHOLE, *HEADS, *ALONE, "mlp_hidden")
LAYERS = {
    "singular": ("layer *", "layer 0, 2", "layer 1"),
    "plural": ("layers 0..1", "layers *"),
    "window": ("layer * window 2", "layer 1..2 window 3"),
}
HEAD_UNITS = ("head 0, 1", "head 1", "heads *", "heads 0, 1")
NEURON_UNITS = ("neuron 2, 20", "neurons 3..9", "neurons *")
POSITIONS = {
    "name": ("last token", "first token", "subject token", "cue token", "last-item token"),
    "count": ("item 1 token", "token -2", "token -3..-2", "subject token + 1", '"w41" token'),
    "each": ("each token of subject", "each item token"),
    "list": ("cue token, last token", "{cue token, last token}", "{first token, cue token}"),
    "span": ("tokens -2..-1", "subject tokens", "tokens between subject token and last token"),
}
UNEVEN = ("subject tokens", "tokens between subject token and last token")
"""Spans of different lengths; only a patch and zeros can be written there."""
FILLS = ("patch", "patch with a run", "zero", "mean", "mean of a run", "resample", "text")
DIRECTIONS = (
    "longer into clean",
    "clean into longer",
    "other into clean",
    "clean into noised",
    "noised into clean",
    "noised into longer",
)
SIDES = ("left", "right")
METRICS = {
    "narrow": (
        "logit(answer) - logit(wrong)",
        "logit(answer) at cue token",
        'logit("w7") + 2 * logit(answer of longer)',
    ),
    "wide": (
        "prob(answer)",
        "kl(clean)",
        "entropy at cue token",
        "js(longer) at subject token",
        "logprob(answer)",
    ),
    "loss": ("loss",),
    "several tokens": ('logprob("w3 w9 w4")', 'logprob("w3 w9") - logit(answer)'),
    "inside": ("cosine(L2.resid, clean)", "cosine(mlp_hidden layer 1, clean) at cue token"),
}


REPLACED = ('replace cue tokens with "w7"', 'replace cue token, "w41" token with "w7"')
RESIZED = ('replace subject tokens with "w7"', 'replace cue tokens with "w7 w8"')
"""Prompts of other lengths; other rules of the experiment may not name a position."""


@dataclass(frozen=True)
class Case:
    """A file, a model and execution options."""

    family: str
    seed: int
    text: str
    side: Any
    pass_tokens: int | None
    prompt_tokens: int
    features: tuple[str, ...] = field(compare=False)
    """Features that occur in the file."""

    @property
    def options(self) -> ExecutionOptions:
        return ExecutionOptions(
            self.side, pass_tokens=self.pass_tokens, prompt_tokens=self.prompt_tokens
        )


Draw = Callable[..., Any]


def one_of(draw: Draw, groups: Mapping[str, tuple[str, ...]]) -> tuple[str, str]:
    """A group, then one of its members: groups are equally frequent."""
    group = draw(st.sampled_from(list(groups)))
    return group, draw(st.sampled_from(groups[group]))


@st.composite
def written_site(draw: Draw, family: str, sweeps: bool) -> tuple[str, list[str]]:
    """A component with its axes, and its features. Without `sweeps`, it has no axis."""
    site = draw(
        st.sampled_from([s for s in EVERY_SITE if (s, family) != ("resid_mid", "gpt_neox")])
    )
    if site in ALONE:
        return site, [site]
    kinds = LAYERS if sweeps else {"plural": LAYERS["plural"]}
    kind, layers = one_of(draw, kinds)
    unit = ""
    if site in HEADS:
        choice = HEAD_UNITS if sweeps else ("heads *", "heads 0, 1")
        unit = draw(st.sampled_from(choice))
    if site == "mlp_hidden":
        choice = NEURON_UNITS if sweeps else ("neurons 3..9", "neurons *")
        unit = draw(st.sampled_from(choice))
    return f"{site} {layers} {unit}".strip(), [site, kind]


@st.composite
def rule(draw: Draw, family: str, first: bool) -> tuple[str, list[str]]:
    fill = draw(st.sampled_from(FILLS if first else FILLS[:-1]))
    if fill == "text":
        return draw(st.sampled_from([*REPLACED, *RESIZED])), [fill]
    site, features = draw(written_site(family, sweeps=first))
    places = POSITIONS if first else {"name": ("last token", "cue token", "subject token")}
    kind, at = one_of(draw, places)
    if at in UNEVEN and fill not in ("patch", "zero"):
        fill = "patch"
    run = draw(st.sampled_from(["other", "clean"]))
    return _rule(fill, site, at, run), [*features, kind, fill]


def _rule(fill: str, site: str, at: str, run: str) -> str:
    return {
        "patch": f"patch {site} at {at}",
        "patch with a run": f"patch {site} at {at} with {run}",
        "zero": f"ablate {site} at {at} with zero",
        "mean": f"ablate {site} at {at} with mean",
        "mean of a run": f"ablate {site} at {at} with mean of {run}",
        "resample": f"ablate {site} at {at} with resample",
    }[fill]


@st.composite
def cases(draw: Draw, seeds: int = 1) -> Case:
    family = draw(st.sampled_from(FAMILIES))
    features, text = [family], ""
    count = draw(st.integers(1, 3))
    for number in range(count):
        rules = [draw(rule(family, first=True))]
        ways = [d for d in DIRECTIONS if rules[0][1] != ["text"] or not d.endswith("noised")]
        direction = draw(st.sampled_from(ways))
        resized = rules[0][0] in RESIZED
        if not resized and draw(st.booleans()):
            rules.append(draw(rule(family, first=False)))
        metrics = [one_of(draw, METRICS) for _ in range(draw(st.integers(1, 2)))]
        metrics = [(kind, m.split(" at ")[0] if resized else m) for kind, m in metrics]
        limit = draw(st.sampled_from(["", "", "", " limit 3"]))
        measures = [f"measure {metric} as delta" for metric in dict.fromkeys(m for _, m in metrics)]
        said = [words for words, _ in rules]
        text += experiment(
            f"e{number}", f"prompts p{limit}", f"from {direction}", *said, *measures, stats=""
        )
        features += [direction, *(kind for kind, _ in metrics)]
        features += [feature for _, found in rules for feature in found]
    side = draw(st.sampled_from(SIDES))
    return Case(
        family,
        draw(st.integers(0, seeds - 1)),
        text,
        side,
        draw(st.sampled_from([None, 15, 60, 100_000])),
        draw(st.sampled_from([20, 4096])),
        (*features, side),
    )


def fixed_cases() -> list[Case]:
    """One for each site, with everything else taking turns."""
    found: list[Case] = []
    places = [(kind, at) for kind, several in POSITIONS.items() for at in several]
    metrics = [(kind, metric) for kind, several in METRICS.items() for metric in several]
    for n, site in enumerate((*EVERY_SITE, "text")):
        family = FAMILIES[n % len(FAMILIES)]
        if (site, family) == ("resid_mid", "gpt_neox"):
            family = "gpt_neox_sequential"
        kind = list(LAYERS)[n % len(LAYERS)]
        unit = {"mlp_hidden": "neurons 3..9", **dict.fromkeys(HEADS, "head 0, 1")}.get(site, "")
        written = f"{site} {LAYERS[kind][0]} {unit}" if site not in ALONE else site
        place, at = places[n * 3 % len(places)]
        fill = FILLS[n % 6] if at not in UNEVEN else "patch"
        said = REPLACED[1] if site == "text" else _rule(fill, written, at, "other")
        metric, measure = metrics[n % len(metrics)]
        direction = DIRECTIONS[n * 5 % len(DIRECTIONS)] if site != "text" else DIRECTIONS[0]
        start = ("prompts p", f"from {direction}", said)
        text = experiment("e0", *start, f"measure {measure} as delta", stats="")
        second = metrics[n * 5 % len(metrics)][1]
        text += experiment("e1", *start, f"measure {second} as delta", stats="")
        side = ("left", "right")[n % 2]
        features = (site, family, kind, place, fill, direction, metric, side)
        found.append(
            Case(family, 0, text, side, (None, 15, 60)[n % 3], (20, 4096)[n % 2], features)
        )
    return found


COVERED = {*EVERY_SITE, *FAMILIES, *LAYERS, *POSITIONS, *FILLS, *DIRECTIONS, *METRICS, *SIDES}
"""Features that must occur in the examples of every property."""


# --- the comparison -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planner")
    write_rows(folder)
    return folder


@cache
def run(case: Case, data: Path, without: frozenset[str]) -> Execution:
    model = adopted(case.family, case.seed)
    return execute_file(_checked(case, data), model, without, case.options)


@cache
def _checked(case: Case, data: Path) -> Any:
    return check_file(case.text, data, adopted(case.family, case.seed), NOISED)


def agree(case: Case, data: Path, without: frozenset[str]) -> None:
    """Assert that every value of every prompt equals the plain executor's."""
    plain = run(case, data, EVERY_PASS).measured
    found = run.__wrapped__(case, data, without).measured
    assert set(found) == set(plain)
    for name, expected in plain.items():
        base = expected.unpatched[expected.experiment.spec.base]
        for number, values in enumerate(expected.patched):
            own = found[name]
            measured = own.unpatched[expected.experiment.spec.base][number]
            np.testing.assert_allclose(measured, base[number], atol=ABSOLUTE, rtol=0)
            error = np.abs(own.patched[number] - values)
            np.testing.assert_array_equal(np.isnan(own.patched[number]), np.isnan(values))
            effect = np.abs(values - base[number])
            assert np.nanmax(error) <= ABSOLUTE, f"{name}: off by {np.nanmax(error):.1e}"
            large = effect > SMALL
            assert (error[large] <= RELATIVE * effect[large]).all(), name


def hold(
    data: Path,
    ways: Callable[[frozenset[str]], Iterable[frozenset[str]]],
    examples: int,
    seeds: int,
    fixed: slice = slice(None),
) -> None:
    """Check the property on fixed and random files. ways: from a random set of passes to sets of
    disabled passes, one after the other. fixed: the fixed files to use."""
    seen: set[str] = set()

    def property_(case: Case, drawn: frozenset[str]) -> None:
        seen.update(case.features)
        for without in ways(drawn):
            agree(case, data, without)

    some = st.frozensets(st.sampled_from(sorted(EVERY_PASS)))
    held = given(case=cases(seeds), drawn=some)(property_)
    for number, case in [*enumerate(fixed_cases())][fixed]:
        held = example(case=case, drawn=frozenset(sorted(EVERY_PASS)[number % 3 :: 3]))(held)
    settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(held)()
    if fixed == slice(None):
        assert not COVERED - seen, f"not covered: {COVERED - seen}"


EXAMPLES = 4
"""Random examples, in addition to the fixed ones."""
PART = 9
"""A single pass has every ninth of the fixed files."""
MANY, SEEDS = 100, 5


@pytest.mark.parametrize("name", sorted(EVERY_PASS))
def test_planner_pass_leaves_values_unchanged(data: Path, name: str) -> None:
    """Only this pass is enabled, or all but this pass: each on a part of the files."""
    hold(
        data,
        lambda drawn: [EVERY_PASS - {name} if name in drawn else frozenset({name})],
        1,
        1,
        slice(sorted(EVERY_PASS).index(name) % PART, None, PART),
    )


def test_all_planner_passes_leave_values_unchanged(data: Path) -> None:
    hold(data, lambda _: [frozenset()], EXAMPLES, 1)


@pytest.mark.slow
def test_any_set_of_planner_passes_leaves_values_unchanged(data: Path) -> None:
    hold(data, lambda drawn: [drawn], EXAMPLES, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EVERY_PASS))
def test_planner_pass_leaves_values_unchanged_on_many_files(data: Path, name: str) -> None:
    """Only this pass is enabled, and all but this pass."""
    hold(data, lambda _: [EVERY_PASS - {name}, frozenset({name})], MANY, SEEDS)


@pytest.mark.slow
def test_any_set_of_planner_passes_leaves_values_unchanged_on_many_files(data: Path) -> None:
    hold(data, lambda drawn: [drawn, frozenset()], 3 * MANY, SEEDS)


def test_families_have_the_units_that_rules_name() -> None:
    """The units that rules name exist in every family."""
    for family in FAMILIES:
        shape = adopted(family).shape
        assert min(unit_count(shape, site, 0) for site in HEADS) >= 2
        assert set(EVERY_SITE) - {"resid_mid"} <= shape.sites <= set(SITES)
