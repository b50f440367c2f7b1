"""Models with gradient checkpointing: the numbers are those without it, and it stays enabled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mechdsl

from ..fruit import FRUIT
from .test_model_restoration import state

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

MEASURE = "logit(answer) - logit(answer of fewer)"
OTHER = "prompts others {" + FRUIT.partition("prompts fruit {")[2].replace("3..9", "1..2")
ROWS = f"prompts: others, limit: 4, maximise: {MEASURE}, validation: 0%"
FITS = f"""
{OTHER}
circuit c = fit(eap(size: 60), {ROWS}, with: zero)
circuit d = fit(mask(size: 60), {ROWS}, with: zero, steps: 2, batch: 2)
basis b = fit(das(dims: 1), {ROWS}, from: fewer, steps: 2, batch: 2) at resid_post layer 1 at \
last token
"""


def experiment(name: str, rule: str, using: str = "") -> str:
    lines = "from clean into fewer", rule, f"measure {MEASURE} as delta", using
    return (
        f"\nexperiment {name} {{\n  model toy\n  prompts fruit limit 2\n"
        + "".join(f"  {line}\n" for line in lines)
        + "}\n"
    )


HEADS = "patch layer 0..1 head * at last token"
ESTIMATES = "".join(
    experiment(f"by_{name.partition('(')[0]}", HEADS, f"using {name}")
    for name in ("atp", "integrated_gradients(steps: 2)", "relp")
)
RULES = "".join(
    (
        experiment("ablated", "ablate c at last token with zero"),
        experiment("masked", "ablate d at last token with zero"),
        experiment("rotated", "patch resid_post layer 1 in basis b at last token"),
    )
)


def values(text: str, model: Any, tokenizer: Any, **options: Any) -> dict[str, Any]:
    """The patched values of each experiment, and the gradient of an objective."""
    given = {"toy": (model, tokenizer)}
    found = {each.name: each.measures[0].patched for each in mechdsl.run(text, given, **options)}
    plain = f"{FRUIT}\nexperiment plain {{ prompts fruit limit 2 measure {MEASURE} as raw }}\n"
    own = mechdsl.objective(plain, models=given, site="embed", at="last token")
    start = own.start.detach().clone().requires_grad_()
    own(start).sum().backward()
    found["objective"] = start.grad
    return found


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, own in found.items():
        np.testing.assert_allclose(own, expected[name], rtol=1e-5, atol=1e-6)
        assert np.abs(np.asarray(own)).max() > 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointing_of_transformers_changes_no_number_and_no_identity(
    reentrant: bool, pair: tuple[Any, Any], tmp_path: Path
) -> None:
    """Trainings of the checkpointed model are found by a run of the model without it."""
    plain, tokenizer = pair
    model = deepcopy(plain).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    before, text = state(model), FRUIT + FITS + ESTIMATES + RULES
    of = tmp_path / "checkpointed", tmp_path / "plain"
    mechdsl.fit(text, {"toy": (model, tokenizer)}, store=of[0])
    mechdsl.fit(text, {"toy": pair}, store=of[1])
    found = values(text, model, tokenizer, store=of[0])
    assert state(model) == before
    agree(found, values(text, plain, tokenizer, store=of[1]))
    again = mechdsl.run(FRUIT + FITS + RULES, {"toy": pair}, store=of[0], only="rotated")
    agree({"rotated": again["rotated"].measures[0].patched}, {"rotated": found["rotated"]})


def run_checkpointed(
    forward: Callable[..., Any], reentrant: bool, hidden: Tensor, *args: Any, **kwargs: Any
) -> Any:
    own = partial(forward, **kwargs)
    return checkpoint(own, hidden, *args, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_code_that_checkpoints_in_eval_mode_gives_the_same_gradients(
    reentrant: bool, pair: tuple[Any, Any]
) -> None:
    plain, tokenizer = pair
    model = deepcopy(plain)
    blocks: list[nn.Module] = list(model.model.layers)
    for block in blocks:
        block.forward = partial(run_checkpointed, block.forward, reentrant)
    text = FRUIT + ESTIMATES
    agree(values(text, model, tokenizer), values(text, plain, tokenizer))
