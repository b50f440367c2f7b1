"""Every metric on base, source and patched runs, against formulas in numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mechdsl.results.experiment_result import ExperimentResult

from ..models import families
from ..quick import in_turn
from ..reference.forward import Run, Write, forward
from ..reference.points import Point, copied
from .support import (
    ABSOLUTE,
    MODES,
    RELATIVE,
    SMALL,
    Array,
    Record,
    experiment,
    fast,
    run_file,
    write_rows,
)
from .support import ROWS as PLAIN_ROWS

NUMERALS = range(1, 10)
WORDS = [*families.SPECIAL, *families.WORDS, *(str(n) for n in NUMERALS)]
ID = {word: i for i, word in enumerate(WORDS)}

PROMPTS = """
prompts p {
  rows "data.jsonl"
  xs = list(item, from: words, sep: " ")
  template "{xs} w40 {subject} w41 {cue} w42"
  answer " {n}"
  wrong " {b}"
  text likely = " {guess}"
  text several = " {tail}"
  about = [n - 1, n, n + 3]
  accepted = list(" {w}", from: words)
  corrupt longer { words = more  cue = cue2  n = m }
}
metric ld = logit(answer) - logit(wrong)
"""


def tokenizer(*, bos: bool = True) -> Any:
    """Words and one token per numeral, with or without a leading `<s>`."""
    made = Tokenizer(models.WordLevel(dict(ID), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(families.SPECIAL))
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", ID["<s>"])]
        )
    return fast(made)


@cache
def model(family: str) -> Any:
    return families.module(family, vocab_size=len(WORDS))


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


@dataclass(frozen=True)
class Text:
    """A prompt and the positions that measures and rules name."""

    ids: list[int]
    subject: int

    @property
    def last(self) -> int:
        return len(self.ids) - 1


def text_of(record: Record, run: str) -> Text:
    items = record["more" if run == "longer" else "words"]
    cue = record["cue2" if run == "longer" else "cue"]
    whole = " ".join([*items, "w40", record["subject"], "w41", cue, "w42"])
    return Text([ID["<s>"], *ids(whole)], len(items) + 1 + len(record["subject"].split()))


@dataclass(frozen=True)
class Ran:
    """One run of one row: unpatched, or the clean prompt with changes."""

    family: str
    record: Record
    text: Text
    writes: Sequence[Write]

    @cached_property
    def _run(self) -> Run:
        return forward(self.family, model(self.family), self.text.ids, self.writes)

    @cached_property
    def logits(self) -> Array:
        return self._run.logits.double().numpy()

    def site(self, site: str, layer: int) -> Array:
        return self._run[site, layer].double().numpy()

    def behind(self, continuation: list[int]) -> Array:
        """Logits with more tokens at the end."""
        longer = [*self.text.ids, *continuation]
        found = forward(self.family, model(self.family), longer, self.writes).logits
        return found.double().numpy()

    def reference(self, run: str) -> Ran:
        return unpatched(self.family, ROWS.index(self.record), run)


@cache
def unpatched(family: str, row: int, run: str) -> Ran:
    return Ran(family, ROWS[row], text_of(ROWS[row], run), ())


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def at_end(ran: Ran) -> Array:
    return ran.logits[ran.text.last]


def at_subject(ran: Ran) -> Array:
    return ran.logits[ran.text.subject]


def logprob_of(ran: Ran, text: str) -> float:
    target = ids(text)
    found = log_softmax(ran.behind(target[:-1]))
    return float(sum(found[ran.text.last + i, t] for i, t in enumerate(target)))


def rank_of(ran: Ran, word: str) -> float:
    logits = at_end(ran)
    return float(1 + (logits > logits[ID[word]]).sum())


def kl(p: Array, q: Array) -> float:
    log_p, log_q = log_softmax(p), log_softmax(q)
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def js(p: Array, q: Array) -> float:
    a, b = np.exp(log_softmax(p)), np.exp(log_softmax(q))
    middle = (a + b) / 2
    return float(((a * np.log(a / middle)).sum() + (b * np.log(b / middle)).sum()) / 2)


def entropy(logits: Array) -> float:
    log_p = log_softmax(logits)
    return float(-(np.exp(log_p) * log_p).sum())


def loss(ran: Ran) -> float:
    """The mean loss of the prompt's tokens; `<s>` predicts the first one."""
    log_p = log_softmax(ran.logits)
    return float(-np.mean([log_p[i, ran.text.ids[i + 1]] for i in range(ran.text.last)]))


def cosine(a: Array, b: Array) -> float:
    a, b = a.flatten(), b.flatten()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def difference(ran: Ran, where: Callable[[Ran], Array] = at_end) -> float:
    logits = where(ran)
    return float(logits[ID[str(ran.record["n"])]] - logits[ID[ran.record["b"]]])


def numerals(ran: Ran) -> Array:
    return at_end(ran)[[ID[str(n)] for n in NUMERALS]]


def share(logits: Array) -> Array:
    return np.exp(log_softmax(logits))


def compared(ran: Ran, run: str, site: str, layer: int, *unit: int) -> float:
    other = ran.reference(run)
    mine = ran.site(site, layer)[ran.text.last]
    theirs = other.site(site, layer)[other.text.last]
    return cosine(mine[list(unit)], theirs[list(unit)]) if unit else cosine(mine, theirs)


def answer(ran: Ran) -> str:
    return str(ran.record["n"])


def in_set(ran: Ran, words: Iterable[int | str]) -> float:
    return float(sum(share(at_end(ran))[ID[str(word)]] for word in set(map(str, words))))


def mean_of(ran: Ran, numbers: Iterable[int]) -> float:
    own = list(numbers)
    restricted = share(at_end(ran)[[ID[str(n)] for n in own]])
    return float(restricted @ np.array(own))


def about(ran: Ran) -> list[int]:
    n = ran.record["n"]
    return [n - 1, n, n + 3]


MEASURES: Mapping[str, Callable[[Ran], float]] = {
    "logit(answer)": lambda r: at_end(r)[ID[answer(r)]],
    'logit("w7")': lambda r: at_end(r)[ID["w7"]],
    "logit(answer) - logit(wrong)": difference,
    "logit(answer of longer)": lambda r: at_end(r)[ID[str(r.record["m"])]],
    "ld": difference,
    "2 * ld - 1": lambda r: 2 * difference(r) - 1,
    "logprob(answer)": lambda r: log_softmax(at_end(r))[ID[answer(r)]],
    'logprob("w3 w9 w1")': lambda r: logprob_of(r, "w3 w9 w1"),
    "logprob(several)": lambda r: logprob_of(r, r.record["tail"]),
    "logprob(several) - logprob(answer)": lambda r: (
        logprob_of(r, r.record["tail"]) - logprob_of(r, answer(r))
    ),
    "prob(answer)": lambda r: share(at_end(r))[ID[answer(r)]],
    "prob(2..5)": lambda r: sum(share(at_end(r))[ID[str(n)]] for n in range(2, 6)),
    "rank(answer)": lambda r: rank_of(r, answer(r)),
    "correct": lambda r: float(at_end(r).argmax() == ID[answer(r)]),
    "correct(likely)": lambda r: float(at_end(r).argmax() == ID[r.record["guess"]]),
    "expected(1..9)": lambda r: float(share(numerals(r)) @ np.array(NUMERALS)),
    "argmax(1..9)": lambda r: float(numerals(r).argmax() + 1),
    "absolute_error(1..9)": lambda r: abs(numerals(r).argmax() + 1.0 - r.record["n"]),
    "absolute_error(1..9, m + 1)": lambda r: abs(numerals(r).argmax() - float(r.record["m"])),
    "absolute_error(1..9, m of longer)": lambda r: abs(numerals(r).argmax() + 1.0 - r.record["m"]),
    "absolute_error(about, n)": lambda r: abs(
        float(max(about(r), key=lambda n: at_end(r)[ID[str(n)]])) - r.record["n"]
    ),
    "prob(n + 1..9)": lambda r: in_set(r, range(r.record["n"] + 1, 10)),
    "prob(1..n) - prob(n + 1..9)": lambda r: (
        in_set(r, range(1, r.record["n"] + 1)) - in_set(r, range(r.record["n"] + 1, 10))
    ),
    "prob(1..2, n + 1..9)": lambda r: in_set(r, {1, 2, *range(r.record["n"] + 1, 10)}),
    "prob(about)": lambda r: in_set(r, about(r)),
    "prob(answer, wrong, answer)": lambda r: in_set(r, [answer(r), r.record["b"]]),
    'prob([n, " w7"], accepted, accepted of longer)': lambda r: in_set(
        r, {r.record["n"], "w7", *r.record["words"], *r.record["more"]}
    ),
    "logprob(answer, wrong)": lambda r: float(np.log(in_set(r, [answer(r), r.record["b"]]))),
    "rank(answer, wrong)": lambda r: min(rank_of(r, answer(r)), rank_of(r, r.record["b"])),
    "correct(answer, likely)": lambda r: float(
        at_end(r).argmax() in (ID[answer(r)], ID[r.record["guess"]])
    ),
    "expected(n - 1..n + 2)": lambda r: mean_of(r, range(r.record["n"] - 1, r.record["n"] + 3)),
    "expected(about)": lambda r: mean_of(r, about(r)),
    "argmax(about)": lambda r: max(about(r), key=lambda n: at_end(r)[ID[str(n)]]),
    "prob(n + 1..9) at subject token": lambda r: float(
        sum(share(at_subject(r))[ID[str(n)]] for n in range(r.record["n"] + 1, 10))
    ),
    "kl(clean)": lambda r: kl(at_end(r.reference("clean")), at_end(r)),
    "kl(longer)": lambda r: kl(at_end(r.reference("longer")), at_end(r)),
    "js(clean)": lambda r: js(at_end(r.reference("clean")), at_end(r)),
    "entropy": lambda r: entropy(at_end(r)),
    "top_margin": lambda r: float(np.diff(np.sort(at_end(r))[-2:])[0]),
    "loss": loss,
    "cosine(L1.resid, clean)": lambda r: compared(r, "clean", "resid_post", 1),
    "cosine(z layer 2 head 1, longer)": lambda r: compared(r, "longer", "z", 2, 1),
    "cosine(mlp_hidden layer 1, longer)": lambda r: compared(r, "longer", "mlp_hidden", 1),
    "logit(answer) * prob(answer)": lambda r: (
        at_end(r)[ID[answer(r)]] * share(at_end(r))[ID[answer(r)]]
    ),
    "ld at subject token": lambda r: difference(r, at_subject),
    "top_margin at subject token": lambda r: float(np.diff(np.sort(at_subject(r))[-2:])[0]),
    "entropy at subject token": lambda r: entropy(at_subject(r)),
    "kl(longer) at subject token": lambda r: kl(at_subject(r.reference("longer")), at_subject(r)),
    "logit(wrong) at subject token - 1": lambda r: r.logits[r.text.subject - 1, ID[r.record["b"]]],
}

TOGETHER = [metric for metric in MEASURES if metric != "logit(answer) - logit(wrong)"]
"""The measures of one experiment; `ld` is one that is left out."""


def rows() -> list[Record]:
    """The prompts, with numbers for answers."""
    found: list[Record] = []
    for n, record in enumerate(PLAIN_ROWS):
        made = {**record, "n": n + 2, "m": n + 5, "tail": ["w1", "w2 w8", "w5 w6 7", "w9"][n]}
        text = text_of(made, "clean" if n % 2 else "longer")
        made["guess"] = WORDS[int(forward("gpt2", model("gpt2"), text.ids).logits[-1].argmax())]
        found.append(made)
    return found


ROWS = rows()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics")
    write_rows(folder, ROWS)
    return folder


@cache
def results(folder: Path, family: str, mode: str) -> dict[str, ExperimentResult]:
    text = "".join(
        experiment(
            f"e{n}",
            "prompts p",
            "from longer into clean",
            "patch resid_mid layer 1..2 at {subject tokens, last token}",
            f"measure {metric} as raw",
        )
        for n, metric in enumerate(MEASURES)
    )
    together = [f"measure {metric} as raw" for metric in TOGETHER]
    text += experiment(
        "all",
        "prompts p",
        "from longer into clean",
        "patch resid_mid layer 1..2 at {subject tokens, last token}",
        *together,
    )
    return run_file(
        text, folder, model(family), MODES[mode], tokenizer=tokenizer(), prompts=PROMPTS
    )


def edits(family: str, record: Record, layer: int) -> list[Write]:
    base, source = text_of(record, "clean"), text_of(record, "longer")
    n = len(record["subject"].split())

    def places(text: Text) -> list[int]:
        return [*range(text.subject - n + 1, text.subject + 1), text.last]

    seen = forward(family, model(family), source.ids).seen
    return copied([Point("resid_mid", layer)], seen, places(source), places(base))


@cache
def edited(family: str, row: int, layer: int) -> Ran:
    """The clean prompt of a row with `edits`."""
    record = ROWS[row]
    return Ran(family, record, text_of(record, "clean"), edits(family, record, layer))


@cache
def expected(family: str, metric: str) -> tuple[Array, Array, Array]:
    """Base and source [prompt], patched [cell, prompt]."""
    own = MEASURES[metric]
    base, source, patched = [], [], []
    for row in range(len(ROWS)):
        base.append(own(unpatched(family, row, "clean")))
        source.append(own(unpatched(family, row, "longer")))
        patched.append([own(edited(family, row, layer)) for layer in (1, 2)])
    return np.array(base), np.array(source), np.array(patched).T


def close(found: Array, wanted: Array, effect: Array) -> None:
    error = np.abs(found - wanted)
    assert error.max() <= ABSOLUTE * np.maximum(1, np.abs(wanted)).max()
    assert (error <= RELATIVE * np.maximum(np.abs(effect), SMALL)).all()


@pytest.mark.parametrize("metric", list(MEASURES))
@pytest.mark.parametrize(("family", "mode"), in_turn(["llama", "gpt2"], list(MODES)))
def test_metric_equals_its_formula_on_every_run(
    shared: Path, metric: str, family: str, mode: str
) -> None:
    number = list(MEASURES).index(metric)
    base, source, patched = expected(family, metric)
    found = results(shared, family, mode)
    measures = [found[f"e{number}"].measures[0]]
    if metric in TOGETHER:
        measures.append(found["all"].measures[TOGETHER.index(metric)])
    for measure in measures:
        assert measure.source is not None
        close(measure.patched, patched, patched - base)
        close(measure.base[0], base, np.ones_like(base))
        close(measure.source[0], source, np.ones_like(base))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("family", "mode"), in_turn(["gpt2", "llama", "gpt_neox"], list(MODES)))
def test_loss_equals_that_of_transformers(shared: Path, family: str, mode: str, bos: bool) -> None:
    text = experiment("e", "prompts p", "measure loss as raw")
    own = tokenizer(bos=bos)
    found = run_file(text, shared, model(family), MODES[mode], tokenizer=own, prompts=PROMPTS)["e"]
    expected: list[float] = []
    for record in ROWS:
        ids = torch.tensor([text_of(record, "clean").ids[0 if bos else 1 :]])
        with torch.no_grad():
            expected.append(float(model(family)(ids, labels=ids).loss))
    assert np.abs(found.measures[0].base[0] - expected).max() <= 1e-5
    assert found.conventions["loss"] == "mean over the prompt's own tokens " + (
        "including the first, which `<s>` predicts"
        if bos
        else "except the first, which nothing predicts: no special token precedes it"
    )


def test_patch_changes_most_reference_metrics() -> None:
    """Otherwise, the comparison above would prove nothing."""
    still = []
    for metric in MEASURES:
        base, _, patched = expected("gpt2", metric)
        if np.abs(patched - base).max() <= 10 * ABSOLUTE:
            still.append(metric)
    assert set(still) <= {"correct", "argmax(about)", "absolute_error(about, n)"}, still


def test_reference_values_of_correct_include_true_and_false() -> None:
    for metric in ("correct(likely)", "correct(answer, likely)"):
        base, source, _ = expected("gpt2", metric)
        assert set(base) | set(source) == {0.0, 1.0}


def test_categories_report_most_common_value_share_and_mean_error(shared: Path) -> None:
    number = list(MEASURES).index("argmax(1..9)")
    statistics = results(shared, "gpt2", "planned")[f"e{number}"].statistics[0]
    _, _, patched = expected("gpt2", "argmax(1..9)")
    truth = np.array([record["n"] for record in ROWS])
    for cell, values in enumerate(patched):
        counts = {v: list(values).count(v) for v in sorted(set(values))}
        common = max(counts, key=lambda v: counts[v])
        assert statistics.commonest[cell] == common
        assert statistics.share[cell] == counts[common] / len(ROWS)
        assert statistics.mean_error[cell] == np.abs(values - truth).mean()


def test_mean_of_absolute_errors_is_the_mean_error_of_the_category(shared: Path) -> None:
    """Without a second argument, both compare with the answer."""
    found = results(shared, "gpt2", "planned")
    names = list(MEASURES)
    error = found[f"e{names.index('absolute_error(1..9)')}"].statistics[0]
    category = found[f"e{names.index('argmax(1..9)')}"].statistics[0]
    np.testing.assert_array_equal(error.mean, category.mean_error)


def test_absolute_error_differs_by_item_and_by_loop_value(shared: Path) -> None:
    """The right number is that of the cell; base and source are compared with it, too."""
    text = experiment(
        "e",
        "prompts p",
        "from longer into clean",
        "for i in 2..3 { patch resid_mid layer 1 at each item token }",
        "measure absolute_error(1..9, i * item.index) as delta",
    )
    for mode in MODES:
        found = run_file(
            text, shared, model("gpt2"), MODES[mode], tokenizer=tokenizer(), prompts=PROMPTS
        )["e"]
        measure = found.measures[0]
        assert measure.source is not None
        for cell, key in enumerate(found.cells):
            number = int(str(key.coords["position"]).removeprefix("item "))
            right = int(str(key.coords["i"])) * number
            for n, record in enumerate(ROWS):
                clean, longer = text_of(record, "clean"), text_of(record, "longer")

                def decoded(text: Any, writes: Sequence[Any], record: Record = record) -> int:
                    return int(numerals(Ran("gpt2", record, text, writes)).argmax()) + 1

                assert measure.base[cell, n] == abs(decoded(clean, ()) - right)
                assert measure.source[cell, n] == abs(decoded(longer, ()) - right)
                if number > min(len(record["words"]), len(record["more"])):
                    assert np.isnan(measure.patched[cell, n])
                    continue
                seen = forward("gpt2", model("gpt2"), longer.ids).seen
                edit = copied([Point("resid_mid", 1)], seen, [number], [number])
                assert measure.patched[cell, n] == abs(decoded(clean, edit) - right)


@pytest.mark.slow
def test_item_index_in_a_measure_text_is_that_of_the_cell(shared: Path) -> None:
    """`{item.index}` is the value of the sweep; base and source are measured per cell, too."""
    text = experiment(
        "e",
        "prompts p",
        "from longer into clean",
        "patch resid_mid layer 1 at each item token",
        'measure logit(" {item.index}") as delta',
    )
    for mode in MODES:
        found = run_file(
            text, shared, model("gpt2"), MODES[mode], tokenizer=tokenizer(), prompts=PROMPTS
        )["e"]
        measure = found.measures[0]
        assert measure.source is not None
        for cell in range(len(found.cells)):
            for n, record in enumerate(ROWS):
                clean, longer = text_of(record, "clean"), text_of(record, "longer")
                target = ID[str(cell + 1)]
                base = at_end(Ran("gpt2", record, clean, {}))[target]
                source = at_end(Ran("gpt2", record, longer, {}))[target]
                assert abs(measure.base[cell, n] - base) <= ABSOLUTE
                assert abs(measure.source[cell, n] - source) <= ABSOLUTE
                if cell >= min(len(record["words"]), len(record["more"])):
                    assert np.isnan(measure.patched[cell, n])
                    continue
                seen = forward("gpt2", model("gpt2"), longer.ids).seen
                edit = copied([Point("resid_mid", 1)], seen, [cell + 1], [cell + 1])
                patched = at_end(Ran("gpt2", record, clean, edit))[target]
                assert abs(measure.patched[cell, n] - patched) <= ABSOLUTE


def test_run_computes_no_gradients(shared: Path) -> None:
    results(shared, "gpt2", "planned")
    assert all(p.grad is None for p in model("gpt2").parameters())
    assert torch.is_grad_enabled()
