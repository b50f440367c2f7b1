"""Every metric against an independent computation in numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats

from mechdsl.vocab.metrics import METRICS, metric

ROWS, VOCAB = 7, 29


@pytest.fixture(name="logits")
def _logits() -> torch.Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0)) * 4


def values(name: str, takes: str, *arguments: torch.Tensor) -> np.ndarray:
    return METRICS[name].forms[takes].function(*arguments).numpy()


def softmax(logits: torch.Tensor) -> np.ndarray:
    return special.softmax(logits.double().numpy(), axis=-1)


def test_logit_and_prob_equal_numpy(logits: torch.Tensor) -> None:
    target = torch.arange(ROWS)
    assert values("logit", "target", logits, target) == pytest.approx(np.diag(logits))
    expected = softmax(logits)[np.arange(ROWS), np.arange(ROWS)]
    assert values("prob", "target", logits, target) == pytest.approx(expected, rel=1e-5)


def test_rank_is_one_plus_the_strictly_greater() -> None:
    logits = torch.tensor([[3.0, 1.0, 3.0, 2.0]]).repeat(4, 1)
    target = torch.tensor([0, 1, 2, 3])
    assert values("rank", "target", logits, target).tolist() == [1, 4, 1, 3]


def test_correct_is_one_only_for_the_best_token(logits: torch.Tensor) -> None:
    best = logits.argmax(-1)
    assert values("correct", "target", logits, best).tolist() == [1.0] * ROWS
    assert values("correct", "target", logits, (best + 1) % VOCAB).tolist() == [0.0] * ROWS
    assert METRICS["correct"].forms["target"].default == "answer"


def test_logprob_sums_the_tokens_of_the_mask() -> None:
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(ROWS, 3, VOCAB, generator=random)
    ids = torch.randint(0, VOCAB, (ROWS, 3), generator=random)
    mask = torch.arange(3)[None] < torch.arange(1, ROWS + 1)[:, None].clamp(max=3)
    expected = [
        sum(
            special.log_softmax(logits[r, k].double().numpy())[ids[r, k]]
            for k in range(3)
            if mask[r, k]
        )
        for r in range(ROWS)
    ]
    assert values("logprob", "continuation", logits, ids, mask) == pytest.approx(expected, rel=1e-5)


def test_numeral_metrics_equal_numpy(logits: torch.Tensor) -> None:
    """Rows have different numerals; entries after the end of a row don't count."""
    ids = torch.tensor([4, 9, 2, 17]).expand(ROWS, -1)
    numbers = torch.tensor([1, 2, 3, 4]).expand(ROWS, -1)
    mask = torch.arange(4)[None] < torch.tensor([4, 2, 1, 3, 4, 1, 2])[:, None]
    p = softmax(logits)[:, ids[0]] * mask.numpy()
    expected = (p * numbers.numpy()).sum(1) / p.sum(1)
    given = (logits, ids, mask, numbers)
    assert values("expected", "numerals", *given) == pytest.approx(expected, rel=1e-5)
    best = numbers.numpy()[0][p.argmax(1)]
    assert values("argmax", "numerals", *given).tolist() == best.tolist()
    assert METRICS["argmax"].forms["numerals"].kind == "category"
    assert values("prob", "numerals", *given) == pytest.approx(p.sum(1), rel=1e-5)
    assert values("prob", "any", *given[:3]) == pytest.approx(p.sum(1), rel=1e-5)
    assert values("logprob", "any", *given[:3]) == pytest.approx(np.log(p.sum(1)), abs=1e-5)
    ranks = (logits[:, None] > logits.gather(1, ids)[:, :, None]).sum(-1) + 1
    ranks = ranks.masked_fill(~mask, VOCAB + 1).amin(-1)
    assert values("rank", "any", *given[:3]).tolist() == ranks.tolist()
    top = logits.argmax(-1)
    at = torch.arange(ROWS) % 4
    ids = ids.scatter(1, at[:, None], top[:, None])
    best = zip(top.tolist(), ids.tolist(), mask.sum(1).tolist(), strict=True)
    right = [float(token in own[:count]) for token, own, count in best]
    assert {0.0, 1.0} == set(right)
    assert values("correct", "any", logits, ids, mask).tolist() == right


def test_kl_and_js_equal_scipy(logits: torch.Tensor) -> None:
    reference = logits.flip(0) * 0.5
    p, q = softmax(reference), softmax(logits)
    assert values("kl", "reference", logits, reference) == pytest.approx(
        special.rel_entr(p, q).sum(1), rel=1e-4
    )
    m = (p + q) / 2
    js = (special.rel_entr(p, m).sum(1) + special.rel_entr(q, m).sum(1)) / 2
    assert values("js", "reference", logits, reference) == pytest.approx(js, rel=1e-4)
    assert values("kl", "reference", logits, logits) == pytest.approx(0, abs=1e-6)


def test_excluded_tokens_add_nothing_to_entropy_and_divergences() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert values("entropy", "nothing", logits) == pytest.approx(np.log(2))
    assert values("kl", "reference", logits, logits) == pytest.approx(0)
    assert values("js", "reference", logits, logits) == pytest.approx(0)
    assert np.isinf(values("kl", "reference", logits, torch.zeros(1, 3))).all()


def test_top_margin_equals_the_difference_of_the_two_largest_logits(logits: torch.Tensor) -> None:
    ordered = np.sort(logits.numpy(), axis=1)
    expected = ordered[:, -1] - ordered[:, -2]
    assert values("top_margin", "nothing", logits) == pytest.approx(expected, rel=1e-5)
    assert values("top_margin", "nothing", torch.tensor([[2.0, 2.0, 1.0]])) == pytest.approx(0)


def test_entropy_equals_scipy(logits: torch.Tensor) -> None:
    expected = stats.entropy(softmax(logits), axis=1)
    assert values("entropy", "nothing", logits) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("left", [False, True])
def test_loss_averages_only_masked_tokens(left: bool) -> None:
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 6, VOCAB, generator=random)
    ids = torch.randint(0, VOCAB, (1, 6), generator=random)
    mask = torch.tensor([[False, False, True, True, True, False]])
    if not left:
        mask = torch.tensor([[False, True, True, True, False, False]])
    counted = np.flatnonzero(mask[0].numpy())
    expected = -np.mean(
        [special.log_softmax(logits[0, t - 1].double().numpy())[ids[0, t]] for t in counted]
    )
    assert values("loss", "prompt", logits, ids, mask)[0] == pytest.approx(expected, rel=1e-5)


def test_loss_of_no_token_is_undefined() -> None:
    mask = torch.tensor([[False, False]])
    assert np.isnan(
        values("loss", "prompt", torch.zeros(1, 2, 5), torch.zeros(1, 2).long(), mask)
    ).all()


def test_cosine_averages_over_positions() -> None:
    a = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    b = torch.tensor([[[0.0, 2.0], [3.0, 3.0]]])
    assert values("cosine", "activations", a, b) == pytest.approx(0.5)


def test_half_precision_is_widened(logits: torch.Tensor) -> None:
    half = logits.half()
    target = torch.zeros(ROWS, dtype=torch.long)
    assert METRICS["prob"].forms["target"].function(half, target).dtype == torch.float32
    double = METRICS["prob"].forms["target"].function(logits.double(), target)
    assert double.dtype == torch.float64


@pytest.mark.parametrize("name", list(METRICS))
def test_every_metric_form_is_documented(name: str) -> None:
    entry = METRICS[name]
    assert entry.forms
    for form in entry.forms.values():
        assert form.meaning
        assert form.unit
        assert "returns: [row]" in (form.function.__doc__ or "")


def test_duplicate_metric_form_is_rejected() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        metric("prob", takes="target", unit="probability")(lambda logits, target: target)
