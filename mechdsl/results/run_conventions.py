"""What was defaulted, dropped or chosen in an experiment, in words, by short key."""

from __future__ import annotations

from typing import Any

from mechdsl.execute.execute import Measured
from mechdsl.execute.profile import Profile
from mechdsl.execute.sizes import PassSizes
from mechdsl.execute.unpatched_batch import noise_scale
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.plan.plan import PROMPT_TOKENS, ExperimentPlan
from mechdsl.vocab.sites import WITHIN_ATTENTION

EDGES = {
    "block": "blocked keys get no weight: a score of −∞ before softmax",
    "reweight": "weights are multiplied, then the query's weights add up to 1 again",
    "uniform": "the keys share evenly what they have together, the others keep theirs",
    "weight": "each key gets the weight, the others share what is left as they did before",
}
"""Per change of edges, what it does to a query's weights."""


def model_words(model: LoadedModel) -> str:
    return f"{model.shape.architecture}, {model.provenance.get('source', '')}"


def conventions(plan: ExperimentPlan, measured: Measured, model: LoadedModel) -> dict[str, str]:
    """What was defaulted, dropped or chosen, in words."""
    experiment = plan.experiment
    found = {
        "model": model_words(model),
        "dtype": f"{str(model.dtype).removeprefix('torch.')} on {model.device}",
        **experiment.table.conventions,
    }
    if experiment.python:
        names: dict[tuple[str, str], dict[str, None]] = {}
        for each in experiment.python:
            names.setdefault((each.file, each.digest), {})[f"`{each.name}`"] = None
        found["python"] = "; ".join(
            f"{', '.join(own)} of {file}, SHA-256 {digest[:12]}…"
            for (file, digest), own in names.items()
        )
    if experiment.keep:
        conditions = " and ".join(measure.text for measure in experiment.keep)
        dropped = len(experiment.table) - len(measured.kept)
        found["keep"] = f"{len(measured.kept)} rows kept, {dropped} dropped ({conditions})"
    for name, run in experiment.table.runs.items():
        noise = run.noise
        if noise is not None and noise.sds is not None:
            value = f"{noise.sds:g} sd = {noise_scale(model, noise):.4g}"
            found[f"noise of {name}"] = f"{found[f'noise of {name}']}, {value}"
    found.update(experiment.picks)
    fills = [
        _fill_words(
            rule.rule.fill,
            rule.rule.run if rule.rule.apart is None else rule.rule.apart.name,
            rule.rule.spec.by,
        )
        for rule in plan.rules
        if rule.rule.fill in ("zero", "mean", "resample")
    ]
    found.update(_within(plan, model))
    found.update(_paths(plan, model))
    if fills:
        found["fill"] = "; ".join(dict.fromkeys(fills))
    if measured.dropped:
        found["resample"] = (
            f"{measured.dropped} rows of cells left out: the other row lacks the position"
        )
    if len(plan.rules) > 1:
        found["rules"] = (
            "together in one run; where two write the same vector, the later one stands"
        )
    if any(_windowed(rule.rule.spec) for rule in plan.rules):
        found["window"] = "layers l − ⌊w/2⌋ … l + ⌈w/2⌉ − 1, cut at the ends"
    if any(_several(rule.positions) for rule in plan.rules):
        found["tokens"] = "several tokens under one label are separate runs, averaged per row"
    left_out = dict.fromkeys(x for rule in plan.rules for x in rule.rule.positions.left_out)
    if left_out:
        found["positions"] = f"left out, as no row has them in both runs: {', '.join(left_out)}"
    if experiment.control is not None:
        inside = f"{experiment.spec.statistics.confidence:g} % of the draws lie in the band"
        found["controls"] = f"{experiment.control.said}; {inside}"
    elif any(rule.rule.fill != "observe" for rule in plan.rules):
        found["controls"] = "none (`against random(20)` adds matched random targets)"
    if measured.inert:
        found["inert"] = (
            f"{int(plan.inert.sum())} of {plan.n_cells} cells, and {measured.inert:,} of "
            f"{measured.rows:,} rows in all, can't differ from the base run"
        )
    return found


def fallbacks(model: LoadedModel, profile: Profile) -> dict[str, str]:
    """Where the run did not go as planned."""
    found: dict[str, str] = {}
    if not model.restartable:
        found["planner"] = "every row is a whole forward pass: the model can't be restarted"
    if profile.halved:
        times = "once" if profile.halved == 1 else f"{profile.halved} times"
        found["memory"] = f"ran out {times}; passes were halved and run again"
    return found


def pass_sizes(sizes: PassSizes) -> dict[str, str]:
    """What `--pass-tokens` and `--prompt-tokens` repeat, where it isn't what always stands."""
    if sizes.chosen == "default" and sizes.prompt_tokens == PROMPT_TOKENS:
        return {}
    passes, prompts = f"{sizes.pass_tokens:,}", f"{sizes.prompt_tokens:,}"
    return {"passes": f"up to {passes} tokens each, prompts in batches of up to {prompts}"}


def _fill_words(fill: str, run: str, by: str | None) -> str:
    match fill:
        case "zero":
            return "zero"
        case "mean":
            within = f", within each {by}" if by else ""
            return f"mean over the rows of {run}, per position{within}"
        case _:
            return f"{run} run of another row (a seeded permutation without fixed points)"


def _windowed(rule: Any) -> bool:
    return rule.site is not None and any(axis.window is not None for axis in rule.site.axes)


def _several(positions: Any) -> bool:
    return any(len(row) > 1 for cell in positions for row in cell.hits)


def _within(plan: ExperimentPlan, model: LoadedModel) -> dict[str, str]:
    """How attention is changed, and that it is written out for it."""
    rules = [rule.rule for rule in plan.rules if rule.rule.sites is not None]
    kinds = [rule.edge.kind for rule in rules if rule.edge is not None]
    found = {}
    said = [EDGES[kind] for kind in dict.fromkeys(kinds) if kind in EDGES]
    if said:
        found["edges"] = "; ".join(said) + "; sinks count among the rest"
    points = {p for rule in plan.rules for p in (*rule.point_table, *rule.source_table)}
    layers = sorted({p.layer for p in points if p.site in WITHIN_ATTENTION and p.layer is not None})
    own = model.provenance.get("attention", "")
    if layers:
        where = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        by_itself = f" (the model's own is `{own}`)" if own not in ("", "eager") else ""
        found["attention"] = f"written out (eager) in {where}{by_itself}"
    return found


def _paths(plan: ExperimentPlan, model: LoadedModel) -> dict[str, str]:
    """What path patching holds, and which pairs there are none of."""
    found: dict[str, str] = {}
    for rule in plan.rules:
        if rule.paths is None:
            continue
        last = model.shape.n_layers - 1
        held = [f"the heads (z) of layers 0 to {last}"]
        if not rule.paths.through_mlps:
            held.append(f"the MLPs (mlp_out) of layers 0 to {last}")
        through = ", MLPs and norms recomputed" if rule.paths.through_mlps else ", norms recomputed"
        after = "" if rule.paths.at_the_end else "; receivers are then written into the base run"
        found["path"] = (
            f"beside the senders, {' and '.join(held)} are held at the base run{through}{after}"
        )
        missing = int((~plan.exists).sum())
        if missing:
            found["pairs"] = (
                f"{plan.n_cells - missing} of {plan.n_cells}; in the others no receiver lies "
                "behind a sender"
            )
    return found
