"""Probes that a file declares with `probe t = fit(ridge, …)`.

Their maps are compared with a solved ridge regression and scikit-learn's logistic regression on
vectors of the bare model, one unpadded prompt at a time, and with `observe probe` fitted on the
same rows. Further tests: held-out rows and controls, observations, weights as directions, keys, and
errors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import mechdsl
from mechdsl.fits.reports import ProbeReport

from ..quick import some
from ..reference.forward import Write
from ..reference.r_squared import r_squared_contributions
from ..rules.models import bare
from ..rules.support import Text, edited, plain, token, tokens
from .test_trained_dictionaries import assert_same_results, models, run, train, write
from .test_trained_rotations import OTHER, checked, training_errors, word_tokenizer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
FAMILIES = ("gpt2", "llama", "gpt_neox")
KINDS = ["red", "blue", "green"]

Array = NDArray[np.float64]
Record = dict[str, Any]


def records(count: int, seed: int) -> list[Record]:
    random = np.random.default_rng(seed)
    found: list[Record] = []
    for number in range(count):
        words = [f"w{n}" for n in random.integers(0, 38, 6)]
        found.append(
            {
                "text": " ".join(words[: 1 + number % 3]),
                "right": words[3],
                "turn": words[4],
                "a": words[5],
                "size": int(random.integers(-5, 6)) + number / 10,
                "kind": KINDS[number % 3],
                "pair": ["no", "yes"][(number // 2) % 2],
                "same": 3,
                "only": "odd" if number == 4 else ["x", "y"][number % 2],
                "list": [number, 2 * number],
            }
        )
    return found


TRAINING, UNORDERED = records(24, 1), records(9, 3)
BLOCKS = """
prompts t {
  rows "training.jsonl"
  template "{text} w43 {right} w40"
  answer " {a}"
  corrupt turned { right = turn }
}
prompts q {
  rows "tested.jsonl"
  template "{text} w43 {right} w40"
  answer " {a}"
  corrupt turned { right = turn }
}
prompts second {
  rows "tested.jsonl"
  template "{text} {right} w40"
  answer " {a}"
  wrong " {right}"
  corrupt turned { right = turn }
}
prompts bare_rows {
  rows "other.jsonl"
  template "{text} w43 {right} w40"
  answer " {a}"
}
"""
LAST = "resid_post layer * at last token"
ALL = "validation: 0%"


def fit(
    inner: str = "ridge(penalty: 2)",
    options: str = ALL,
    *,
    target: str = "size",
    at: str = LAST,
    prompts: str = "t",
    name: str = "r",
) -> str:
    return f"probe {name} = fit({inner}, prompts: {prompts}, target: {target}, {options}) at {at}\n"


def experiment(*lines: str, name: str = "e", block: str = "q") -> str:
    body = "".join(f"  {line}\n" for line in ("model m", f"prompts {block}", *lines))
    return f"experiment {name} {{\n{body}  stats bootstrap(100) correct none\n}}\n"


READ = f"observe probe(r) {LAST} as seen"
READS = experiment(READ)


def write_file(folder: Path, *parts: str) -> Path:
    other = [{k: v for k, v in r.items() if k != "size"} for r in records(6, 5)]
    for name, rows in (("training", TRAINING), ("tested", UNORDERED), ("other", other)):
        text = "".join(json.dumps(each) + "\n" for each in rows)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")
    return write(folder, *parts, blocks=BLOCKS)


def report(found: mechdsl.TrainedFit) -> ProbeReport:
    assert isinstance(found.report, ProbeReport)
    return found.report


def maps(found: mechdsl.TrainedFit) -> dict[str, Array]:
    return load_file(found.folder / "probe.safetensors")


def in_order(path: Path) -> list[Record]:
    """The tested rows in the order of the table of the first experiment."""
    (first, *_) = checked(path, bare("llama")).experiments
    return [UNORDERED[row] for row in first.table.row_ids]


# --- references -----------------------------------------------------------------------------------


def text_of(record: Record, run: str = "clean") -> Text:
    left = record["text"].split()
    words = (*left, "w43", record["turn" if run == "turned" else "right"], "w40")
    return Text(words, {"text": tuple(range(1, len(left) + 1)), "right": (len(left) + 2,)})


def vectors(
    family: str, rows: list[Record], layer: int, at: str = "last token", run: str = "clean"
) -> Array:
    """[row, width] means over the tokens of unpadded prompts."""
    found: list[Array] = []
    for text in (text_of(each, run) for each in rows):
        own = plain(family, text)["resid_post", layer][tokens(text, at)].flatten(1)
        found.append(own.double().mean(0).numpy())
    return np.stack(found)


def solve_ridge(x: Array, y: Array, penalty: float) -> tuple[Array, float]:
    mean, spread = x.mean(0), x.std(0)
    z = (x - mean) / spread
    weights = np.linalg.solve(z.T @ z + penalty * np.eye(x.shape[1]), z.T @ (y - y.mean()))
    weights = weights / spread
    return weights, float(y.mean() - mean @ weights)


def solve_logistic(x: Array, y: list[str], penalty: float) -> tuple[Array, Array, list[str]]:
    from sklearn.linear_model import LogisticRegression

    mean, spread = x.mean(0), x.std(0)
    model = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10000)
    model.fit((x - mean) / spread, y)
    weights = model.coef_ / spread
    intercept = model.intercept_ - weights @ mean
    return weights, intercept - intercept.mean(), list(model.classes_)


def column(rows: list[Record], name: str) -> Array:
    return np.array([each[name] for each in rows], dtype=np.float64)


# --- maps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at", ["last token", "text tokens"])
def test_ridge_probe_equals_a_solved_regression(family: str, at: str, tmp_path: Path) -> None:
    """Compare map, R² and predictions on other rows, and predictions in another run."""
    place = f"resid_post layer * at {at}"
    lines = (
        f"observe probe(r) {place} as seen",
        f"observe prediction(r) {place} as predicted",
        "observe prediction(r) resid_post layer * of turned at token -2..-1 as moved",
    )
    path = write_file(tmp_path, fit(at=place), experiment(*lines))
    (found,) = train(path, family)
    own = maps(found)
    rows = in_order(path)
    seen, predicted, moved = run(path, family).files[0].experiments
    targets = column(rows, "size")
    for layer in range(3):
        x = vectors(family, TRAINING, layer, at)
        weights, intercept = solve_ridge(x, column(TRAINING, "size"), 2.0)
        assert np.allclose(own[f"layer.{layer}.weight"][0], weights, atol=1e-3)
        made = vectors(family, rows, layer, at) @ weights + intercept
        assert np.allclose(predicted.measures[0].patched[layer], made, atol=2e-3)
        wanted = r_squared_contributions(targets, made)
        assert np.allclose(seen.measures[0].patched[layer], wanted, atol=5e-3)
        for number, word in enumerate(("right", "last")):
            there = vectors(family, rows, layer, f"{word} token", "turned")
            mine = moved.measures[0].patched[2 * layer + number]
            assert np.allclose(mine, there @ weights + intercept, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_logistic_probe_equals_scikit_learn(family: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    lines = (
        "observe probe(r) resid_post layer 1 at last token as seen",
        'observe prediction(r, class: "green") resid_post layer 1 at last token as predicted',
    )
    line = fit("logistic(penalty: 0.5)", target="kind", at="resid_post layer 1 at last token")
    path = write_file(tmp_path, line, experiment(*lines))
    train(path, family)
    rows = in_order(path)
    seen, predicted = run(path, family).files[0].experiments
    x = vectors(family, TRAINING, 1)
    weights, intercept, classes = solve_logistic(x, [each["kind"] for each in TRAINING], 0.5)
    assert classes == sorted(KINDS)
    logits = vectors(family, rows, 1) @ weights.T + intercept
    right = np.array([classes[n] for n in logits.argmax(1)]) == [each["kind"] for each in rows]
    assert (seen.measures[0].patched[0] == right).all()
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = np.log(odds / (1 - odds))[:, classes.index("green")]
    assert np.allclose(predicted.measures[0].patched[0], wanted, atol=1e-2)


SAME = {
    "ridge": ("ridge(penalty: 2)", "size", "kind: ridge, penalty: 2"),
    "chosen penalty": ("ridge", "size", "kind: ridge"),
    "logistic": ("logistic", "kind", "kind: logistic"),
    "two classes": ("logistic(penalty: 3)", "pair", "penalty: 3"),
    "expression": ("ridge(penalty: 2)", "2 * size + 1", "penalty: 2"),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("at", ["last token", "{text tokens, right token}"])
def test_trained_probe_equals_observe_probe_on_the_same_rows(
    name: str, at: str, tmp_path: Path
) -> None:
    """Compare values and the shuffled control, in two experiments on one block."""
    inner, target, options = SAME[name]
    place = f"resid_post layer * at {at}"
    fitted = f"observe probe({target}, train: t, {options}) at {place} as seen_2"
    path = write_file(
        tmp_path,
        fit(inner, target=target, at=place),
        experiment(f"observe probe(r) at {place} as seen"),
        experiment(fitted, name="f"),
    )
    train(path)
    own, direct = run(path).files[0].experiments
    for mine, theirs in zip(own.measures, direct.measures, strict=True):
        assert np.allclose(mine.patched, theirs.patched, atol=1e-9)
    assert len(own.measures) == 2


def test_predictions_of_a_probe_are_log_odds_of_the_second_class(tmp_path: Path) -> None:
    lines = [
        "observe prediction(r) layer * at last token as plain".replace("layer", "resid_post layer"),
        'observe prediction(r, class: "yes") resid_post layer * at last token as yes',
        'observe prediction(r, class: "no") resid_post layer * at last token as no',
        READ,
    ]
    path = write_file(tmp_path, fit("logistic", target="pair"), experiment(*lines))
    train(path)
    rows = in_order(path)
    plainly, yes, no, seen = (e.measures[0].patched for e in run(path).files[0].experiments)
    assert (plainly == yes).all()
    assert np.allclose(yes, -no, atol=1e-6)
    right = (yes > 0) == np.array([each["pair"] == "yes" for each in rows])
    assert (seen == right).all()


# --- held-out rows and controls -------------------------------------------------------------------


def test_probe_report_has_held_out_rows_and_controls(tmp_path: Path) -> None:
    """Each class has held-out rows; scores equal those of the stored maps on these rows."""
    line = fit("logistic(penalty: 0.001)", "validation: 25%", target="kind")
    path = write_file(tmp_path, line, READS)
    (found,) = train(path, out=tmp_path)
    said, own = report(found), maps(found)
    assert (said.rows, said.held_out_rows, said.unit) == (18, 6, "accuracy")
    assert said.layers == [0, 1, 2]
    assert len(said.random) == 3
    assert said.constant == pytest.approx(1 / 3)
    card = (tmp_path / "r" / "README.md").read_text("utf-8")
    assert card.startswith("# r: logistic probe of 3 classes")
    assert "of the classes blue, green, red" in card
    conventions = run(path).files[0].experiments[0].conventions
    assert (
        "24 rows of t at last token, to predict `kind`, 6 of them held out"
        in (conventions["probe r"])
    )
    # The 18 training rows are separable, so all misses are held-out rows.
    for number, layer in enumerate(said.layers):
        assert isinstance(layer, int)
        x = vectors("llama", TRAINING, layer)
        made = (x @ own[f"layer.{layer}.weight"].T + own[f"layer.{layer}.bias"]).argmax(1)
        right = made == [sorted(KINDS).index(each["kind"]) for each in TRAINING]
        missed = (~right).sum()
        trained, score = said.trained[number], said.shuffled[number]
        assert trained is not None
        assert score is not None
        assert round(6 * (1 - trained)) == missed


# --- observations ---------------------------------------------------------------------------------


def test_probe_of_one_layer_is_read_in_all_layers(tmp_path: Path) -> None:
    """At every layer, in a derived run and under active rules; equal after a reload."""
    lines = (
        "run changed { ablate mlp_out layer 0 at tokens * with zero }",
        "observe probe(r) resid_post layer * of changed at last token as seen",
        f"observe prediction(r) {LAST} as predicted",
    )
    acts = experiment(
        "ablate mlp_out layer 0 at tokens * with zero",
        f"observe prediction(r) {LAST} as acting",
        "measure acting as raw",
        name="acts",
    )
    line = fit(at="resid_post layer 1 at last token")
    path = write_file(tmp_path, line, experiment(*lines), acts)
    (found,) = train(path)
    rows = in_order(path)
    first = run(path).files[0].experiments
    assert "trained on vectors of L1.resid_post" in first[0].conventions["observed"]
    assert_same_results(first, run(path, fresh=True).files[0].experiments)
    own = maps(found)
    made = vectors("llama", rows, 2) @ own["layer.1.weight"][0] + own["layer.1.bias"]
    assert np.allclose(first[1].measures[0].patched[2], made, atol=1e-3)
    changed = first[2].measures[0].patched
    targets = column(rows, "size")
    for layer in range(3):
        wanted = r_squared_contributions(targets, changed[layer])
        assert np.allclose(first[0].measures[0].patched[layer], wanted, atol=1e-3)


def test_probe_predictions_at_generated_tokens_equal_a_longer_prompt(tmp_path: Path) -> None:
    """The reference reads the same tokens as part of a longer prompt."""
    place = "resid_post layer 1 at last token"
    text = experiment(
        "generate 2", "observe prediction(r) resid_post layer 1 at each reply token as predicted"
    )
    path = write_file(tmp_path, fit(at=place), text)
    (found,) = train(path)
    (done,) = run(path).files[0].experiments
    own = maps(found)
    model = bare("llama")
    for row, record in enumerate(in_order(path)):
        text = text_of(record)
        ids = torch.tensor([text.ids])
        with torch.no_grad():
            reply = model(ids).logits[0, -1].argmax()
            longer = torch.cat([ids, reply.reshape(1, 1)], 1)
            states = model(longer, output_hidden_states=True).hidden_states[2][0, -1]
        made = states.double().numpy() @ own["layer.1.weight"][0] + own["layer.1.bias"][0]
        assert done.measures[0].patched[0][row] == pytest.approx(made, abs=2e-3)


@pytest.mark.slow
def test_probe_model_option_names_the_training_model(tmp_path: Path) -> None:
    """`model:` names the model that runs the training rows, whatever model experiments use."""
    place = "resid_post layer 1 at last token"
    tuned = "model tuned = m with { scale weights of layer 0 neuron 5 by 0 }\n"
    reads = f"observe probe(r) {place} as "
    texts = [
        experiment(f"{reads}one", name="e"),
        experiment(f"{reads}two", name="f").replace("model m", "model tuned"),
    ]
    path = write_file(tmp_path, tuned, fit(options=f"{ALL}, model: m", at=place), *texts)
    (found,) = train(path)
    assert run(path).complete
    (own,) = train(write_file(tmp_path, tuned, fit(at=place), texts[0]))
    assert own.folder == found.folder
    assert len(train(write_file(tmp_path, tuned, fit(at=place), *texts))) == 2


def test_probe_model_of_another_shape_is_rejected(tmp_path: Path) -> None:
    place = "resid_post layer 1 at last token"
    line = fit(options=f"{ALL}, model: k", at=place)
    path = write_file(tmp_path, 'model k = local("other")\n', line, experiment(READ))
    handed = {**models("llama"), "k": (bare("gpt_neox"), word_tokenizer())}
    with pytest.raises(mechdsl.MechdslError) as found:
        mechdsl.fit(path, handed, store=tmp_path / "store")
    assert "E0415" in {each.code for each in found.value.diagnostics}


# --- heads ----------------------------------------------------------------------------------------

HEADS = "z layer * head * at last token"


def head_vectors(family: str, rows: list[Record], layer: int, head: int) -> Array:
    """[row, width] at the last token."""
    texts = map(text_of, rows)
    found = [plain(family, text)["z", layer][text.last, head] for text in texts]
    return np.stack([own.double().numpy() for own in found])


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_of_every_head_equals_a_solved_regression(family: str, tmp_path: Path) -> None:
    """Compare map, score and predictions on other rows, in a sweep and for one head."""
    lines = (
        f"observe probe(r) {HEADS} as seen",
        f"observe prediction(r) {HEADS} as predicted",
        "observe prediction(r) z layer 1 head 1 at last token as one",
    )
    path = write_file(tmp_path, fit(at=HEADS), experiment(*lines))
    (found,) = train(path, family, out=tmp_path)
    card = (tmp_path / "r" / "README.md").read_text("utf-8")
    assert "`layer.N.head.N.weight`" in card
    own, rows, said = maps(found), in_order(path), report(found)
    count = plain(family, text_of(rows[0]))["z", 0].shape[1]
    sites = [(layer, head) for layer in range(3) for head in range(count)]
    assert said.layers == [f"L{layer}H{head}" for layer, head in sites]
    seen, predicted, one = (
        each.measures[0].patched for each in run(path, family).files[0].experiments
    )
    targets = column(rows, "size")
    for number, (layer, head) in enumerate(sites):
        x = head_vectors(family, TRAINING, layer, head)
        weights, intercept = solve_ridge(x, column(TRAINING, "size"), 2.0)
        assert np.allclose(own[f"layer.{layer}.head.{head}.weight"][0], weights, atol=1e-3)
        made = head_vectors(family, rows, layer, head) @ weights + intercept
        assert np.allclose(predicted[number], made, atol=2e-3)
        wanted = r_squared_contributions(targets, made)
        assert np.allclose(seen[number], wanted, atol=5e-3)
    assert np.array_equal(one[0], predicted[sites.index((1, 1))])


# --- weights as directions ------------------------------------------------------------------------

D = "direction d = probe(r)\n"
ONE = "resid_post layer 1 at last token"
MARGIN = "measure logit(answer) - logit(wrong) as raw"
ACTS = {
    "add": ("add 2 * d to {}",),
    "sum": ("add d - unit(d) to {}",),
    "project": ("project out d from {}",),
    "clamp": ("clamp d of {} to 1",),
    "sweep": (f"for c in [0, 1, 3] {{ add c * d to {ONE} }}", "against random(3, directions)"),
    "basis": ("from turned into clean", "patch resid_post layer 1 in basis b at last token"),
    "derived": (
        "run moved { add d to {} }",
        "from moved into clean",
        "patch layer 2 head * at last token",
    ),
    "replies": ("generate 3", "add d to resid_post layer 1 at tokens *"),
}


@pytest.mark.parametrize("name", some(ACTS, [*ACTS][::3]))
def test_probe_direction_in_rules_equals_a_saved_vector(name: str, tmp_path: Path) -> None:
    """A second experiment reads the probe."""
    is_class = len(name) % 2 == 0
    inner, target = ("logistic", "pair") if is_class else ("ridge(penalty: 2)", "size")
    measure = "measure logit(answer) as raw" if name == "replies" else MARGIN
    rules = [line.replace("{}", ONE) for line in ACTS[name]]
    read = experiment(f"observe probe(r) {ONE} as seen", name="f")
    basis = "basis b = directions(d) at resid_post layer 1\n" if name == "basis" else ""
    acts = experiment(*rules, measure, block="second")
    line = fit(inner, target=target, at=ONE)
    path = write_file(tmp_path, line, D, basis, acts, read)
    (found,) = train(path)
    own = run(path).files[0].experiments
    rows = maps(found)["layer.1.weight"]
    save_file({"d": rows[1] - rows[0] if is_class else rows[0]}, tmp_path / "d.safetensors")
    loaded = 'direction d = saved("d.safetensors", "d")\n'
    path = write_file(tmp_path, line, loaded, basis, acts, read)
    wanted = run(path).files[0].experiments
    assert len(own) == len(wanted) == 2
    for mine, theirs in zip(own, wanted, strict=True):
        for one, other in zip(mine.measures, theirs.measures, strict=True):
            assert np.allclose(one.patched, other.patched, atol=1e-5)
    assert len(own[0].controls) == (name != "derived")


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_direction_of_a_class_equals_scikit_learn(family: str, tmp_path: Path) -> None:
    """Compare the direction and the effect of adding it, one unpadded prompt at a time."""
    pytest.importorskip("sklearn")
    line = fit("logistic(penalty: 0.5)", target="kind", at=ONE)
    toward = 'direction d = probe(r, class: "green")\n'
    acts = experiment(
        f"add d to {ONE}", 'save direction d to "d.safetensors"', MARGIN, block="second"
    )
    path = write_file(tmp_path, line, toward, acts)
    train(path, family)
    (done,) = run(path, family).files[0].experiments
    assert "toward `green`" in done.conventions["direction d"]
    assert len(done.controls) == 1
    weights, _, classes = solve_logistic(
        vectors(family, TRAINING, 1), [each["kind"] for each in TRAINING], 0.5
    )
    number = classes.index("green")
    others = np.delete(weights, number, axis=0).mean(axis=0)
    wanted = weights[number] - others
    saved = load_file(tmp_path / "d.safetensors")["d"]
    assert np.allclose(saved, wanted, atol=2e-3)
    (first, *_) = checked(path, bare("llama")).experiments
    added = torch.from_numpy(wanted).double()
    for row, number in enumerate(first.table.row_ids):
        record = UNORDERED[number]
        words = (*record["text"].split(), record["right"], "w40")
        text = Text(words, {})
        act = lambda own: own + added  # noqa: E731
        logits = edited(family, text, [Write("resid_post", 1, act, text.last)]).logits[-1]
        margin = logits[token(record["a"])] - logits[token(record["right"])]
        assert done.measures[0].patched[0][row] == pytest.approx(float(margin), abs=5e-3)


@pytest.mark.slow
def test_probe_directions_of_layers_and_heads_equal_single_probes(tmp_path: Path) -> None:
    """Each cell equals that of a probe trained on its site alone."""
    for at, one in (
        (LAST, "resid_post layer 2 at last token"),
        (HEADS, "z layer 2 head 1 at last token"),
    ):
        acts = experiment(f"add 3 * d to {at}", MARGIN, block="second")
        path = write_file(tmp_path, fit(at=at), D, acts)
        train(path)
        every = run(path).files[0].experiments[0]
        acts = experiment(f"add 3 * d to {one}", MARGIN, block="second")
        path = write_file(tmp_path, fit(at=one), D, acts)
        train(path)
        alone = run(path).files[0].experiments[0]
        cells = [each.coords for each in every.cells]
        place = {"layer": 2} if at == LAST else {"layer": 2, "head": 1}
        (cell,) = (n for n, own in enumerate(cells) if own == place)
        assert np.allclose(every.measures[0].patched[cell], alone.measures[0].patched[0], atol=1e-5)


@pytest.mark.slow
def test_probe_with_several_seeds_has_a_direction_per_seed(tmp_path: Path) -> None:
    acts = experiment(f"add d to {ONE}", MARGIN, block="second")
    seeds = fit(options="validation: 25%, seeds: 2", at=ONE)
    path = write_file(tmp_path, seeds, D, acts)
    with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
        run(path)
    assert [each.basis for each in train(path)] == ["r[seed 0]", "r[seed 1]"]
    (done,) = run(path).files[0].experiments
    first, second = done.measures[0].patched
    assert not np.allclose(first, second)
    path = write_file(tmp_path, fit(options="validation: 25%, seed: 1", at=ONE), D, acts)
    train(path)
    (alone,) = run(path).files[0].experiments
    assert np.allclose(alone.measures[0].patched[0], second)


def test_measuring_training_rows_with_a_probe_direction_is_rejected(tmp_path: Path) -> None:
    path = write_file(tmp_path, fit(at=ONE), D, experiment(f"add d to {ONE}", MARGIN, block="t"))
    assert training_errors(path.parent / path.name)[0].code in ("E0345", "E0603")


USED: dict[str, tuple[str, str, str]] = {
    "unknown probe": ("probe(r)", "probe(k)", "E0207"),
    "option": ("probe(r)", "probe(r, penalty: 2)", "E0207"),
    "class of a number": ("probe(r)", 'probe(r, class: "x")', "E0207"),
    "site": ("probe(r)", f"probe(r) at {ONE}", "E0341"),
    "no member named": ("add d to", "add d[layer 1] to", "E0341"),
    "width": (f"add d to {ONE}", "add d to z layer 1 head 0 at last token", "E0341"),
}


@pytest.mark.parametrize("name", USED)
def test_invalid_probe_direction_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code = USED[name]
    text = D + experiment(f"add d to {ONE}", MARGIN, block="second")
    assert old in text
    path = write_file(
        tmp_path, fit(at=ONE), text.replace(old, new), experiment(READ.replace("*", "1"), name="f")
    )
    errors = training_errors(path)
    assert errors[0].code == code, errors


def test_model_edit_with_a_probe_direction_is_rejected(tmp_path: Path) -> None:
    changed = "model changed = m with { project out d from weights }\n"
    used = experiment(f"add d to {ONE}", MARGIN, block="second")
    path = write_file(tmp_path, fit(at=ONE), D, changed, used.replace("model m", "model changed"))
    with pytest.raises(mechdsl.MechdslError, match="an edit can't use it yet") as found:
        train(path)
    assert found.value.diagnostics[0].code == "E0344"


# --- keys -----------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "trainer": {"inner": "ridge(penalty: 3)"},
    "target": {"target": "2 * size"},
    "validation": {"options": "validation: 25%"},
    "seed": {"options": f"{ALL}, seed: 1"},
    "limit": {"options": f"{ALL}, limit: 20"},
    "layers": {"at": "resid_post layer 1 at last token"},
    "site": {"at": "mlp_out layer * at last token"},
    "position": {"at": "resid_post layer * at right token"},
    "run": {"prompts": "turned of t"},
}


def test_probe_key_depends_on_every_argument(tmp_path: Path) -> None:
    used = experiment(READ.replace("*", "1"))
    (base,) = train(write_file(tmp_path, fit(), used))
    folders, first = {base.folder}, maps(base)
    for name, change in CHANGES.items():
        path = write_file(tmp_path, fit(**change), used)
        with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
            run(path)
        (found,) = train(path)
        assert found.folder not in folders, name
        folders.add(found.folder)
        other = maps(found)
        assert other.keys() != first.keys() or any(
            not np.array_equal(other[key], first[key]) for key in first
        ), name
    (family,) = train(write_file(tmp_path, fit(), used), "gpt2")
    assert family.folder.name not in {each.name for each in folders}


def test_probe_key_ignores_names_and_observed_sites(tmp_path: Path) -> None:
    (before,) = train(write_file(tmp_path, fit(), READS))
    for parts in (
        (fit(name="k"), READS.replace("(r)", "(k)")),
        (fit(), experiment(READ.replace("layer *", "layer 0"))),
        (fit(options=f"{ALL}, measure_on_training_rows: true"), READS),
    ):
        path = write_file(tmp_path, *parts)
        (found,) = train(path)
        assert (found.folder, found.seconds) == (before.folder, 0.0)
        assert run(path).complete


def test_probe_training_is_found_after_a_library_filled_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first hub request fills such a cache, and in transformers 5.17 each new model."""
    from transformers.utils import hub

    monkeypatch.setattr(hub, "_hf_api", None)
    path = write_file(tmp_path, fit(), READS)
    train(path)
    monkeypatch.setattr(hub, "_hf_api", object())
    assert run(path).complete


def test_probe_observations_depend_on_the_training(tmp_path: Path) -> None:
    """Two trainings in one store, used by consecutive runs."""
    lines = READ, f"observe prediction(r) {LAST} as predicted"
    seen: list[Any] = []
    for inner in ("ridge(penalty: 2)", "ridge(penalty: 20)", "ridge(penalty: 2)"):
        path = write_file(tmp_path, fit(inner), experiment(*lines))
        train(path)
        seen.append([e.measures[0].patched for e in run(path).files[0].experiments])
    for first, other, again in zip(*seen, strict=True):
        assert abs(first - other).max() > 1e-6
        assert (first == again).all()


# --- missing trainings, and errors ----------------------------------------------------------------


def test_missing_probe_training_affects_only_dependent_experiments(tmp_path: Path) -> None:
    path = write_file(tmp_path, fit(), READS, OTHER)
    with pytest.warns(mechdsl.MechdslWarning, match="isn't trained"):
        found = run(path).files[0]
    assert [each.name for each in found.experiments] == ["control"]
    assert len(run(path, fit=True).files[0].experiments) == 2


def test_plan_and_explain_work_before_a_probe_training(tmp_path: Path) -> None:
    path = write_file(tmp_path, fit(), READS)
    assert mechdsl.plan(path, models=models()) is not None
    text = str(mechdsl.explain(path, models=models()))
    assert "probe r: ridge probe of a number trained on 24 rows of t at last token" in text


def test_damaged_probe_file_is_trained_again(tmp_path: Path) -> None:
    path = write_file(tmp_path, fit(), READS)
    (found,) = train(path)
    weights = found.folder / "probe.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-8])
    with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
        run(path)
    train(path)
    assert weights.read_bytes() == before


def test_measuring_training_rows_of_a_probe_is_rejected(tmp_path: Path) -> None:
    for line in (READ, f"observe prediction(r) {LAST} as seen"):
        used = experiment(line, block="t")
        with pytest.raises(mechdsl.MechdslError, match="measures rows that `r` is trained on") as e:
            train(write_file(tmp_path, fit(), used))
        assert e.value.diagnostics[0].code == "E0345"
        allowed = write_file(tmp_path, fit(options=f"{ALL}, measure_on_training_rows: true"), used)
        train(allowed)
        (done,) = run(allowed).files[0].experiments
        assert "24 of the 24 rows measured here are training rows" in done.conventions["probe r"]


MISTAKES: dict[str, tuple[str, str, str]] = {
    "no target": ("target: size, ", "", "E0207"),
    "unknown value": ("target: size", "target: sizes", "E0501"),
    "constant value": ("target: size", "target: same", "E0342"),
    "class as number": ("target: size", "target: kind", "E0342"),
    "list": ("target: size", "target: list", "E0342"),
    "class of one row": (
        "ridge(penalty: 2), prompts: t, target: size",
        "logistic, prompts: t, target: only",
        "E0342",
    ),
    "no rows": ("prompts: t, ", "", "E0207"),
    "unknown model": (ALL, f"{ALL}, model: k", "E0201"),
    "penalty": ("penalty: 2", "penalty: 0", "E0342"),
    "option": ("penalty: 2", "l2: 2", "E0207"),
    "steps": (ALL, "steps: 3", "E0207"),
    "measure": (ALL, "maximise: logit(answer)", "E0207"),
    "other name": ("ridge(penalty: 2)", "linear", "E0203"),
    "basis": ("probe r", "basis r", "E0342"),
    "lens": (
        "fit(ridge(penalty: 2), prompts: t, target: size, validation: 0%)",
        'saved("a", "b")',
        "E0342",
    ),
    "no site": (f" at {LAST}", "", "E0342"),
    "joined layers": ("layer *", "layers *", "E0342"),
    "joined heads": ("resid_post layer *", "z layer 1 heads *", "E0342"),
    "neuron": ("resid_post layer *", "mlp_hidden layer 1 neuron 2", "E0342"),
    "missing layer": ("layer *", "layer 9", "E0302"),
    "several positions": ("last token", "token -2..-1", "E0342"),
    "equal tokens": ("last token", "token 0", "E0643"),
    "same name": ("probe r", "metric r = logit(answer)\nprobe r", "E0202"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_probe_argument_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code = MISTAKES[name]
    assert old in fit()
    path = write_file(tmp_path, fit().replace(old, new), READS)
    errors = training_errors(path, "gpt2")
    assert errors[0].code == code, errors


OBSERVED: dict[str, tuple[str, str]] = {
    "layer without a map": ("observe probe(r) resid_post layer * at last token", "E0207"),
    "options": ("observe probe(r, folds: 3) resid_post layer 1 at last token", "E0207"),
    "unknown": ("observe prediction(k) resid_post layer 1 at last token", "E0201"),
    "no name": ("observe prediction(3) resid_post layer 1 at last token", "E0207"),
    "no argument": ("observe prediction resid_post layer 1 at last token", "E0207"),
    "class of a number": ("observe prediction(r, class: 3) resid_post layer 1 at last token",
                          "E0207"),
    "width": ("observe prediction(r) z layer 1 head 0 at last token", "E0207"),
    "joined": ("observe prediction(r) resid_post layers 1..2 at last token", "E0207"),
    "as a basis": ("ablate resid_post layer 1 in basis r at last token with zero", "E0201"),
    "as a direction": ("add 2 * r to resid_post layer 1 at last token", "E0201"),
}  # fmt: skip


@pytest.mark.parametrize("name", OBSERVED)
def test_invalid_probe_observation_is_rejected(name: str, tmp_path: Path) -> None:
    line, code = OBSERVED[name]
    at = "resid_post layer 0..1 at last token"
    path = write_file(
        tmp_path,
        fit(at=at),
        experiment(line),
        experiment(READ.replace("layer *", "layer 1"), name="f"),
    )
    errors = training_errors(path)
    assert errors[0].code == code, errors


def test_rows_without_the_target_have_predictions_but_no_scores(tmp_path: Path) -> None:
    lines = f"observe probe(r) {LAST} as seen", f"observe prediction(r) {LAST} as predicted"
    with pytest.raises(mechdsl.MechdslError) as found:
        train(write_file(tmp_path, fit(), experiment(lines[0], block="bare_rows")))
    assert "E0501" in {each.code for each in found.value.diagnostics}
    path = write_file(tmp_path, fit(), experiment(lines[1], block="bare_rows"))
    train(path)
    assert run(path).complete


def test_unknown_class_in_evaluated_rows_is_rejected(tmp_path: Path) -> None:
    line = fit("logistic", target="kind", at="resid_post layer 1 at last token")
    text = experiment("observe probe(r) resid_post layer 1 at last token")
    path = write_file(tmp_path, line, text)
    rows = [*UNORDERED, {**UNORDERED[0], "kind": "pink", "right": "w9"}]
    content = "".join(json.dumps(each) + "\n" for each in rows)
    (tmp_path / "tested.jsonl").write_text(content, "utf-8")
    with pytest.raises(mechdsl.MechdslError, match="1 row where `kind` is `pink`"):
        train(path)


def test_name_shared_by_a_value_and_a_probe_is_rejected(tmp_path: Path) -> None:
    text = READS.replace("(r)", "(size)")
    path = write_file(tmp_path, fit(name="size"), text)
    with pytest.raises(mechdsl.MechdslError, match="a probe and a value of `q`"):
        train(path)
