"""Metrics, one number per prompt, and effects, which compare a metric with that of other runs."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import field
from math import isnan
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from mechdsl.base import limits
from mechdsl.base.records import Record, Registry

if TYPE_CHECKING:
    from torch import Tensor

MetricArgument = Literal[
    "target",
    "any",
    "continuation",
    "numerals",
    "class",
    "label",
    "reference",
    "nothing",
    "prompt",
    "own",
    "activations",
    "rows",
    "observation",
    "reply",
]
"""Argument of a metric. The docstring of each form specifies the shapes.

`resolve.measures` resolves an argument and `execute.measurement.readout` passes it to the function,
so a new argument needs an entry in both.
"""

JoinedTexts = Literal["sum", "log_sum_exp"]
"""How values of single texts give the value of any of them: probabilities are added."""

MetricKind = Literal["number", "category"]
"""Numbers are averaged; for categories, tables show the most frequent one."""


class MetricForm(Record):
    """One form of a metric: `prob(answer)` and `prob(1..9)` are two forms of `prob`."""

    takes: MetricArgument
    unit: str
    kind: MetricKind
    function: Callable[..., Any]
    """Returns a tensor; for replies, a list of numbers."""
    meaning: str
    default: str | None = None
    """The text that is measured if the metric has no argument."""
    narrow: bool = False
    """Whether it reads only the logits of its own tokens, without a sum over the vocabulary."""
    logits: int = 1
    """Number of logits in its value, if its unit is logits: each is rounded separately."""
    compared: bool = False
    """Whether its numbers are differences from the right number: the answer, or a second
    argument."""
    joined: JoinedTexts | None = None
    """How it is computed for any of several texts, of which some have several tokens; without it,
    these texts are an error."""

    @property
    def of_outputs(self) -> bool:
        """Whether it reads the model's logits, and not activations or generated text."""
        return self.takes not in ("activations", "observation", "reply")


class Metric(Record):
    """A name of the language, with its forms."""

    name: str
    forms: dict[MetricArgument, MetricForm] = field(
        default_factory=dict[MetricArgument, MetricForm]
    )


METRICS: Registry[Metric] = Registry("metric")

MetricFunction = TypeVar("MetricFunction", bound=Callable[..., Any])


def metric(
    name: str,
    *,
    takes: MetricArgument,
    unit: str,
    kind: MetricKind = "number",
    default: str | None = None,
    narrow: bool = False,
    logits: int = 1,
    compared: bool = False,
    joined: JoinedTexts | None = None,
) -> Callable[[MetricFunction], MetricFunction]:
    """Register a function as one form of the metric `name`, here or in a plugin.

    The first line of the function's docstring is the description that users see.

    Args:
        name: The name in a file. A metric with several forms registers one function for each.
        takes: What the function receives. The named argument `digits` only selects numerals; no
            named argument reaches the function. A new kind of argument needs the entries that
            docs/architecture.md lists under "argument of a metric".
        unit: The unit in tables. It also determines how rounding is estimated: `logit`, `nat` and
            `number` move like logits, `rank` and `share` if tokens swap, others in proportion.
            `rank` and `share` are step functions without a gradient; sums of probabilities are
            `probability`.
        kind: Whether values are numbers or categories.
        default: See `MetricForm.default`.
        narrow: See `MetricForm.narrow`.
        logits: See `MetricForm.logits`.
        compared: See `MetricForm.compared`.
        joined: See `MetricForm.joined`; for metrics that take a continuation.

    Raises:
        ValueError: If the metric already has a form with this argument.
    """

    def register(function: MetricFunction) -> MetricFunction:
        entry = METRICS.get(name) or METRICS.add(name, Metric(name))
        if takes in entry.forms:
            raise ValueError(f"metric `{name}` that takes {takes} is registered twice")
        meaning = (function.__doc__ or "").strip().split("\n", 1)[0].rstrip(".")
        entry.forms[takes] = MetricForm(
            takes, unit, kind, function, meaning, default, narrow, logits, compared, joined
        )
        return function

    return register


def widen(values: Tensor) -> Tensor:
    """Convert 16-bit values to 32 bits."""
    return values.float() if values.element_size() < 4 else values


def compute_pattern_entropy(weights: Tensor) -> Tensor:
    """Compute the entropy of weights over keys, [..., key] -> [...], in nats."""
    weights = widen(weights)
    return -(weights * weights.clamp_min(1e-38).log()).sum(-1)


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log probabilities of single tokens: logits [..., vocab], ids [...] -> [...], nats."""
    wide = widen(logits)  # logsumexp and gather avoid a second [..., vocab] tensor
    return wide.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats; tokens of probability 0 under p contribute nothing."""
    p = log_p.exp()
    terms = p * (log_p - log_q)
    return terms.where(p > 0, terms.new_zeros(())).sum(-1)


# --- of one token ------------------------------------------------------------------------------


@metric("logit", takes="target", unit="logit", narrow=True)
def logit(logits: Tensor, target: Tensor) -> Tensor:
    """The logit of a token.

    logits: [row, vocab], at the measured position
    target: [row], token ids
    returns: [row], unnormalised log-odds (only differences between tokens mean something)
    source: Zhang & Nanda 2023, arXiv 2309.16042, for differences of two
    """
    return widen(logits.gather(-1, target.unsqueeze(-1)).squeeze(-1))


@metric("prob", takes="target", unit="probability")
def prob(logits: Tensor, target: Tensor) -> Tensor:
    """The probability of a token under the softmax over the whole vocabulary.

    logits: [row, vocab], at the measured position
    target: [row], token ids
    returns: [row], 0..1
    source: Meng et al. 2022, arXiv 2202.05262, for causal tracing
    """
    return _log_probs(logits, target).exp()


@metric("rank", takes="target", unit="rank")
def rank(logits: Tensor, target: Tensor) -> Tensor:
    """The rank of a token; 1 is the best, and tied tokens share the better rank.

    logits: [row, vocab], at the measured position
    target: [row], token ids
    returns: [row], 1 + the number of tokens with a strictly greater logit
    """
    tensor = logits.gather(-1, target.unsqueeze(-1))
    return (logits > tensor).sum(-1).float() + 1


@metric("correct", takes="target", unit="share", default="answer")
def correct(logits: Tensor, target: Tensor) -> Tensor:
    """Whether this token is the most likely one; `correct` alone uses the answer.

    logits: [row, vocab], at the measured position
    target: [row], token ids
    returns: [row], 1.0 or 0.0; its mean is the accuracy
    """
    return (logits.argmax(-1) == target).float()


# --- of any of several texts ----------------------------------------------------------------------


def _of_sets(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Gather the logits of sets of tokens: [row, token], with -inf for padding."""
    tensor = widen(logits.gather(-1, ids))
    return tensor.masked_fill(~mask, -math.inf)


@metric("prob", takes="any", unit="probability")
def prob_of_any(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The probability that one of several tokens is next; equal tokens count once.

    logits: [row, vocab], at the measured position
    ids: [row, token], the different tokens of each row, padded
    mask: [row, token], true where there is one
    returns: [row], 0..1, out of the whole vocabulary
    source: Hanna et al. 2023, arXiv 2305.00586, for sets of years
    """
    return logprob_of_any(logits, ids, mask).exp()


@metric("rank", takes="any", unit="rank")
def rank_of_any(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The rank of the best of several tokens; 1 is the best.

    logits: [row, vocab], at the measured position
    ids: [row, token], the tokens of each row, padded
    mask: [row, token], true where there is one
    returns: [row], 1 + the number of tokens with a strictly greater logit than the best of them
    """
    best = _of_sets(logits, ids, mask).amax(-1, keepdim=True)
    return (widen(logits) > best).sum(-1).float() + 1


@metric("correct", takes="any", unit="share")
def correct_of_any(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Whether the most likely token is one of several accepted ones.

    logits: [row, vocab], at the measured position
    ids: [row, token], the tokens of each row, padded
    mask: [row, token], true where there is one
    returns: [row], 1.0 or 0.0; its mean is the accuracy
    """
    return ((logits.argmax(-1, keepdim=True) == ids) & mask).any(-1).float()


@metric("logprob", takes="any", unit="nat")
def logprob_of_any(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The log probability that one of several tokens is next; equal tokens count once.

    logits: [row, vocab], at the measured position
    ids: [row, token], the different tokens of each row, padded
    mask: [row, token], true where there is one
    returns: [row], nats, at most 0
    """
    return _of_sets(logits, ids, mask).logsumexp(-1) - widen(logits).logsumexp(-1)


# --- of a text of several tokens ----------------------------------------------------------------


@metric("logprob", takes="continuation", unit="nat", joined="log_sum_exp")
def logprob(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The log probability of a text, summed over its tokens.

    logits: [row, token, vocab], those that predict each token of the text
    ids: [row, token], token ids of the text, padded
    mask: [row, token], true where a token is part of the text
    returns: [row], nats, at most 0
    """
    tokens = _log_probs(logits, ids)
    return tokens.where(mask, tokens.new_zeros(())).sum(-1)


@metric("prob", takes="continuation", unit="probability", joined="sum")
def prob_of_continuation(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The probability of a text of several tokens: the product over its tokens.

    logits: [row, token, vocab], those that predict each token of the text
    ids: [row, token], token ids of the text, padded
    mask: [row, token], true where a token is part of the text
    returns: [row], 0..1
    """
    return logprob(logits, ids, mask).exp()


@metric("correct", takes="continuation", unit="share", joined="sum")
def correct_continuation(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Whether greedy decoding generates a text of several tokens.

    logits: [row, token, vocab], those that predict each token of the text
    ids: [row, token], token ids of the text, padded
    mask: [row, token], true where a token is part of the text
    returns: [row], 1.0 or 0.0; its mean is the accuracy
    """
    return ((logits.argmax(-1) == ids) | ~mask).all(-1).float()


# --- over a range of numerals -------------------------------------------------------------------


@metric("expected", takes="numerals", unit="count", narrow=True)
def expected(logits: Tensor, ids: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """The expected number under the distribution restricted to the numerals.

    logits: [row, vocab], at the measured position
    ids: [row, numeral], token ids of the numerals of each row, spelt as in the answer, padded
    mask: [row, numeral], true where there is one
    values: [row, numeral], the numbers that they stand for
    returns: [row], between the smallest and the greatest of the values
    """
    restricted = _of_sets(logits, ids, mask).softmax(-1)
    return (restricted * values.to(restricted.dtype)).sum(-1)


@metric("argmax", takes="numerals", unit="count", kind="category", narrow=True)
def argmax(logits: Tensor, ids: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """The most likely of the numerals.

    logits: [row, vocab], at the measured position
    ids: [row, numeral], token ids of the numerals of each row, spelt as in the answer, padded
    mask: [row, numeral], true where there is one
    values: [row, numeral], the numbers that they stand for
    returns: [row], one of the row's values
    """
    best = _of_sets(logits, ids, mask).argmax(-1, keepdim=True)
    return values.gather(-1, best).squeeze(-1)


@metric("absolute_error", takes="numerals", unit="count", narrow=True, compared=True)
def absolute_error(logits: Tensor, ids: Tensor, mask: Tensor, differences: Tensor) -> Tensor:
    """The distance of the most likely numeral from the answer, or from a second argument.

    logits: [row, vocab], at the measured position
    ids: [row, numeral], token ids of the numerals of each row, spelt as in the answer, padded
    mask: [row, numeral], true where there is one
    differences: [row, numeral], the numbers that they stand for, minus the right number
    returns: [row], at least 0; its mean is the mean absolute error
    """
    best = _of_sets(logits, ids, mask).argmax(-1, keepdim=True)
    return differences.gather(-1, best).squeeze(-1).abs().float()


@metric("prob", takes="numerals", unit="probability")
def prob_of_numerals(logits: Tensor, ids: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """The total probability of the numerals in a range, under the softmax over the vocabulary.

    logits: [row, vocab], at the measured position
    ids: [row, numeral], token ids of the numerals of each row, spelt as in the answer, padded
    mask: [row, numeral], true where there is one
    values: [row, numeral], the numbers that they stand for (not used)
    returns: [row], 0..1
    source: Hanna et al. 2023, arXiv 2305.00586, for ranges that differ by row
    """
    del values
    return prob_of_any(logits, ids, mask)


# --- against another run ------------------------------------------------------------------------


@metric("kl", takes="reference", unit="nat")
def kl(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference ‖ this run) of the next-token distributions.

    logits: [row, vocab], of this run at the measured position
    reference: [row, vocab], of the named run at its own measured position
    returns: [row], nats, 0 where the distributions are equal, infinite where this run excludes a
        token that the reference allows
    source: Kullback & Leibler 1951
    """
    return _divergence(widen(reference).log_softmax(-1), widen(logits).log_softmax(-1))


@metric("js", takes="reference", unit="nat")
def js(logits: Tensor, reference: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of the next-token distributions.

    logits: [row, vocab], of this run at the measured position
    reference: [row, vocab], of the named run at its own measured position
    returns: [row], nats, 0..ln 2, symmetric
    source: Lin 1991, doi 10.1109/18.61115
    """
    log_p, log_q = widen(reference).log_softmax(-1), widen(logits).log_softmax(-1)
    log_mixture = log_p.logaddexp(log_q) - math.log(2)
    return (_divergence(log_p, log_mixture) + _divergence(log_q, log_mixture)) / 2


# --- of the run alone ---------------------------------------------------------------------------


@metric("output", takes="nothing", unit="number")
def output(logits: Tensor) -> Tensor:
    """The output of a regression model.

    logits: [row, 1]
    returns: [row], in the unit that the model was trained on
    """
    return widen(logits.squeeze(-1))


@metric("entropy", takes="nothing", unit="nat")
def entropy(logits: Tensor) -> Tensor:
    """The entropy of the next-token distribution.

    logits: [row, vocab], at the measured position
    returns: [row], nats, 0..ln(vocab)
    """
    log_p = widen(logits).log_softmax(-1)
    p = log_p.exp()
    terms = p * log_p
    return -terms.where(p > 0, terms.new_zeros(())).sum(-1)


@metric("top_margin", takes="nothing", unit="logit", logits=2)
def top_margin(logits: Tensor) -> Tensor:
    """The difference between the two largest logits.

    logits: [row, vocab], at the measured position
    returns: [row], at least 0; infinite where there is one token only that isn't excluded
    """
    best = widen(logits.topk(min(2, logits.shape[-1]), dim=-1).values)
    return best[..., 0] - best[..., -1]


@metric("loss", takes="prompt", unit="nat")
def loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The mean negative log-likelihood of the prompt; its first token counts only after a BOS.

    Each token is predicted from the preceding tokens. The first token of the text counts only if
    the tokenizer adds a special token before it. This is the loss of the model library, without
    special tokens after the text and tokens of images.

    logits: [row, token, vocab], of the whole prompt
    ids: [row, token], the prompt's token ids
    mask: [row, token], true at the tokens that count
    returns: [row], nats per token; NaN where none counts
    """
    counted = mask[:, 1:]
    tokens = _log_probs(logits[:, :-1], ids[:, 1:])
    return -tokens.where(counted, tokens.new_zeros(())).sum(-1) / counted.sum(-1)


@metric("loss", takes="own", unit="nat")
def loss_of_token(logits: Tensor, target: Tensor) -> Tensor:
    """The negative log-likelihood of the token at the measure's position.

    logits: [row, vocab], in front of the token, where it is predicted
    target: [row], the ids of the tokens, those of each run's own text
    returns: [row], nats
    """
    return -_log_probs(logits, target)


@metric("cosine", takes="activations", unit="cosine")
def cosine(activations: Tensor, reference: Tensor) -> Tensor:
    """The cosine similarity of an activation in two runs, at the measure's position.

    activations: [row, position, width], of this run
    reference: [row, position, width], of the named run
    returns: [row], -1..1; NaN where one of the vectors is zero
    """
    a, b = widen(activations), widen(reference)
    return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean(-1)


# --- of a label, on a classifier ----------------------------------------------------------------


@metric("loss", takes="class", unit="nat")
def loss_of_class(logits: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy of a label, as in training.

    logits: [row, label]
    target: [row], numbers of labels
    returns: [row], nats, at least 0
    """
    return -_log_probs(logits, target)


@metric("score", takes="class", unit="logit", narrow=True)
def score(logits: Tensor, target: Tensor) -> Tensor:
    """The similarity score of an image and a text, from a model with an encoder for each.

    logits: [row, text], the model's own `logits_per_image`: cosines times its scale, plus its bias
        if it has one
    target: [row], numbers of texts
    returns: [row], logits
    source: Radford et al. 2021, arXiv 2103.00020; Zhai et al. 2023, arXiv 2303.15343
    """
    return widen(logits.gather(-1, target.unsqueeze(-1)).squeeze(-1))


@metric("output", takes="class", unit="number", narrow=True)
def output_of_class(logits: Tensor, target: Tensor) -> Tensor:
    """One of several outputs of a regression model.

    logits: [row, output]
    target: [row], numbers of outputs
    returns: [row], in the unit that the model was trained on
    """
    return widen(logits.gather(-1, target.unsqueeze(-1)).squeeze(-1))


@metric("prob", takes="label", unit="probability")
def prob_of_label(logits: Tensor, target: Tensor) -> Tensor:
    """The probability of an independent label (multi-label), a sigmoid.

    logits: [row, label]
    target: [row], numbers of labels
    returns: [row], 0..1
    """
    return output_of_class(logits, target).sigmoid()


@metric("correct", takes="label", unit="share", default="answer")
def correct_of_label(logits: Tensor, target: Tensor) -> Tensor:
    """Whether an independent label has a probability above 0.5.

    logits: [row, label]
    target: [row], numbers of labels
    returns: [row], 1.0 or 0.0
    """
    return (output_of_class(logits, target) > 0).float()


@metric("logprob", takes="label", unit="nat")
def logprob_of_label(logits: Tensor, target: Tensor) -> Tensor:
    """The log probability of an independent label.

    logits: [row, label]
    target: [row], numbers of labels
    returns: [row], nats, at most 0
    """
    tensor = output_of_class(logits, target)
    return -(-tensor).logaddexp(tensor.new_zeros(()))


@metric("loss", takes="label", unit="nat")
def loss_of_label(logits: Tensor, target: Tensor) -> Tensor:
    """The binary cross-entropy of an independent label that is true.

    logits: [row, label]
    target: [row], numbers of labels
    returns: [row], nats, at least 0
    """
    return -logprob_of_label(logits, target)


# --- of what is observed ------------------------------------------------------------------------


@metric("attention", takes="observation", unit="share of attention", narrow=True)
def attention(weights: Tensor) -> Tensor:
    """The total weight on the keys of an `observe attention` line.

    weights: [row], averaged over the queries, heads and layers that are joined
    returns: [row], 0..1
    source: Vaswani et al. 2017, arXiv 1706.03762
    """
    return weights


class Reply(Record):
    """Completion of one prompt."""

    ids: tuple[int, ...]
    """Tokens, without an end token. If a stop text ended the reply, its tokens are excluded unless
    they contain text before it."""
    text: str
    """Decoded text including leading and trailing white space, without the stop text."""
    ended: Literal["end", "stop", "length", "broken"]
    """Why generation ended: end token, stop text, maximum length, or logits that aren't numbers."""


ExpectedTexts = Sequence[tuple[str, ...]]
"""[row] arguments of the metric, evaluated in each row."""

FIRST, LAST = "first", "last"

_REPEATED = re.compile(r"\{(\d+)(?:,(\d*))?\}")

_LITERAL_BRACE = re.compile(r"(\\N\{[^}]*\}|\\.)|\{(?!\d*(?:,\d*)?\})", re.DOTALL)

_NUMBER = re.compile(r"(?:(?<![\w.,)])-)?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?")


@metric("exact_match", takes="reply", unit="share", default="answer")
def exact_match(replies: Sequence[Reply], wanted: ExpectedTexts) -> list[float]:
    """Whether the reply equals one of these texts, ignoring surrounding white space.

    replies, wanted: [row]
    returns: [row], 1.0 or 0.0; its mean is the accuracy
    source: Rajpurkar et al. 2016, arXiv 1606.05250, there without case, articles and punctuation
    """
    return [
        float(reply.text.strip() in {text.strip() for text in texts})
        for reply, texts in zip(replies, wanted, strict=True)
    ]


@metric("contains", takes="reply", unit="share")
def contains(replies: Sequence[Reply], wanted: ExpectedTexts) -> list[float]:
    """Whether the reply contains one of these texts, letter for letter.

    A space at the beginning of a text also matches the beginning of the reply, because some
    tokenizers drop the space of a reply's first word.

    replies, wanted: [row]
    returns: [row], 1.0 or 0.0
    source: Zou et al. 2023, arXiv 2307.15043, for phrases of refusal
    """
    return [
        float(any(text in reply.text or f" {reply.text}".startswith(text) for text in texts))
        for reply, texts in zip(replies, wanted, strict=True)
    ]


@metric("matches", takes="reply", unit="share")
def matches(replies: Sequence[Reply], wanted: ExpectedTexts) -> list[float]:
    """Whether the reply contains a match of the regular expression, as in Python's `re.search`.

    replies, wanted: [row], of `wanted` the pattern
    returns: [row], 1.0 or 0.0
    raises: PatternTimeout for one that goes on and on, as many ways of repeating can
    """
    return [
        float(_found(pattern, reply.text, row))
        for row, (reply, (pattern,)) in enumerate(zip(replies, wanted, strict=True))
    ]


class PatternTimeout(Exception):
    """Error for a search in the reply of a row that exceeded its time limit."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row}")
        self.row = row


def check_pattern(pattern: str) -> None:
    """Check a regular expression before any search.

    Raises:
        ValueError: If Python's `re` can't compile the expression or warns about it, or if its
            repetitions are too many.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError, Warning) as error:
            raise ValueError(str(error)) from error
    counts = [int(most or least) for least, most in _REPEATED.findall(pattern)]
    if math.prod(max(1, count) for count in counts) > limits.REPEATS:
        raise ValueError(f"its nested repetitions exceed {limits.REPEATS:,}")


def _found(pattern: str, text: str, row: int) -> bool:
    import regex  # `re` has no timeout

    # `regex` gives a meaning to braces such as `{e<=1}` that `re` takes literally.
    literal = _LITERAL_BRACE.sub(lambda match: match[1] or r"\{", pattern)
    try:
        return regex.search(literal, text, timeout=limits.SEARCH_SECONDS) is not None
    except TimeoutError as error:
        raise PatternTimeout(row) from error


@metric("number", takes="reply", unit="count", kind="category", default=FIRST)
def reply_number(replies: Sequence[Reply], wanted: ExpectedTexts) -> list[float]:
    """The first number in the reply; `number(last)` is the last one.

    Numbers may have a decimal point, commas between thousands, and a minus sign that doesn't follow
    a word or number.

    replies, wanted: [row], of `wanted` `first` or `last`
    returns: [row], NaN where the reply has none
    source: Cobbe et al. 2021, arXiv 2110.14168, for the last one
    """
    reply_numbers: list[float] = []
    for reply, (which,) in zip(replies, wanted, strict=True):
        numbers = _NUMBER.findall(reply.text)
        own = float(numbers[0 if which == FIRST else -1].replace(",", "")) if numbers else math.nan
        reply_numbers.append(own if math.isfinite(own) else math.nan)
    return reply_numbers


@metric("length", takes="reply", unit="token")
def reply_length(replies: Sequence[Reply], wanted: ExpectedTexts) -> list[float]:
    """The number of tokens in the reply, without the end token or stop text.

    replies: [row]. wanted: [row] (not used)
    returns: [row], from 0 to the number after `generate`
    """
    del wanted
    return [float(len(reply.ids)) for reply in replies]


CircuitForm: TypeAlias = Literal[
    "ablate all but CIRCUIT", "ablate CIRCUIT", "ablate all but CIRCUIT without each edge"
]
"""A rule on a circuit, by the edges that it ablates."""

CircuitBaseline: TypeAlias = Literal["everything", "circuit"]
"""A run that effects of a circuit are compared with: every edge or every candidate is ablated, or
all edges but the circuit's."""

CIRCUIT_BASELINES: tuple[CircuitBaseline, ...] = ("everything", "circuit")

EffectTerm = Callable[[Any, Any, Any], Any]
"""Function of (patched, base, source) values, linear in all three and shape-preserving."""


class EffectKind(Record, kw_only=True):
    """An effect: a mean over prompts (`numerator`), or a ratio of two means (`denominator`)."""

    name: str
    meaning: str
    formula: str
    numerator: EffectTerm
    """Also the quantity that the sign-flip test is applied to."""
    denominator: EffectTerm | None = None
    divisor: str = ""
    """Text of the denominator in the formula."""
    absolute: bool = False
    """Whether to divide by the denominator's absolute value."""
    tested: bool = True
    """Whether zero means "no effect", so that a p-value is defined."""
    of_intervention: bool = True
    """Whether it depends on the patched run, so that it is undefined for an inert cell."""
    needs_source: bool = False
    circuit: CircuitForm | None = None
    """The rule on a circuit that it needs. Its `source` is then the run with every edge ablated."""
    node_form: str | None = None
    """The rule that it needs of a circuit of nodes, if it is defined for one."""
    from_circuit: bool = False
    """Whether its `base` is the run with the whole circuit, and its `source` the difference
    between the base run and that with every edge ablated."""
    is_shown_by_zero: bool = False
    """Whether values near 0 show what it measures, so that random targets are compared with these.
    """
    per_prompt_formula: str | None = None
    """Formula of `per prompt` (the mean of the ratios), if that is permitted."""
    zero: str | None = None
    one: str | None = None
    """Runs at 0 and 1 of the scale."""
    scale_free: bool = False
    """Whether the effect has no unit."""

    @property
    def is_tested_intervention(self) -> bool:
        """Whether it is an effect of the rules that is 0 if they change nothing."""
        is_relative = self.circuit is None or self.from_circuit
        return self.of_intervention and self.tested and is_relative

    def name_inert_runs(self, base: str) -> str:
        """Name the runs of which an inert cell equals one.

        Args:
            base: Name of the base run.
        """
        if self.from_circuit:
            return "the circuit"
        return base if self.circuit is None else f"{base} or ∅"

    @property
    def circuit_baselines(self) -> tuple[CircuitBaseline, ...]:
        """The further runs that it depends on."""
        if self.circuit is None:
            return ()
        return CIRCUIT_BASELINES if self.from_circuit else CIRCUIT_BASELINES[:1]

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the runs that it depends on, among `patched`, `base` and `source`."""
        given = {"patched": 2.0, "base": 3.0, "source": 5.0}
        return tuple(
            name for name in given if isnan(self.of_means(*{**given, name: float("nan")}.values()))
        )

    def of_means(self, patched: Any, base: Any, source: Any) -> Any:
        """Compute the effect from mean metrics or from single prompts: arrays of one shape."""
        return self.divide(
            self.numerator(patched, base, source),
            None if self.denominator is None else self.denominator(patched, base, source),
        )

    def divide(self, numerator: Any, denominator: Any) -> Any:
        """Compute the ratio; NaN (never infinite) where the denominator is 0."""
        if denominator is None:
            return numerator
        import numpy as np  # imported here: `validate` only reads the registry of effects

        divisor = np.abs(denominator) if self.absolute else denominator
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(divisor == 0, np.nan, numerator / divisor)


ControlTitle: TypeAlias = Literal["null", "random", "untrained"]
"""Heading of the effects of a control: "null" for one that the file asks for with `against`;
"random" or "untrained" for those that every experiment with something trained has otherwise."""

EFFECTS: Registry[EffectKind] = Registry("effect")


def _effect(entry: EffectKind) -> EffectKind:
    return EFFECTS.add(entry.name, entry)


RAW = _effect(
    EffectKind(
        name="raw",
        meaning="the metric of the patched run",
        formula="m(patched)",
        numerator=lambda patched, base, source: patched,
        tested=False,
    )
)

TOTAL = _effect(
    EffectKind(
        name="total",
        meaning="the difference between the two runs, without an intervention",
        formula="m(source) − m(base)",
        numerator=lambda patched, base, source: source - base,
        of_intervention=False,
        needs_source=True,
        zero="base run",
    )
)

DELTA = _effect(
    EffectKind(
        name="delta",
        meaning="the change caused by the intervention",
        formula="m(patched) − m(base)",
        numerator=lambda patched, base, source: patched - base,
        zero="base run",
    )
)

RECOVERY = _effect(
    EffectKind(
        name="recovery",
        meaning="the share of the difference between base and source run that the rules restore",
        formula="(m(patched) − m(base)) / (m(source) − m(base)), of the means",
        numerator=lambda patched, base, source: patched - base,
        denominator=lambda patched, base, source: source - base,
        divisor="m(source) − m(base)",
        needs_source=True,
        zero="base run",
        one="source run",
        scale_free=True,
    )
)


def _circuit_effect(
    name: str, meaning: str, form: CircuitForm, node_form: str, *, is_shown_by_zero: bool = False
) -> EffectKind:
    """Register a share of the measure between the run with every edge ablated and the base run; for
    a circuit of nodes, between the run with all its candidates ablated and the base run.

    References: Marks et al. 2024 (arXiv 2403.19647), section 4; Mueller et al. 2025 (arXiv
    2504.13151), section 3.2.
    """
    return _effect(
        EffectKind(
            name=name,
            meaning=meaning,
            formula="(m(patched) − m(∅)) / (m(base) − m(∅)), of the means; ∅: every edge ablated",
            numerator=lambda patched, base, source: patched - source,
            denominator=lambda patched, base, source: base - source,
            divisor="m(base) − m(∅)",
            circuit=form,
            node_form=node_form,
            is_shown_by_zero=is_shown_by_zero,
            zero="every edge ablated",
            one="base run",
            scale_free=True,
        )
    )


FAITHFULNESS = _circuit_effect(
    "faithfulness",
    "the share of the full model's metric that a circuit keeps",
    "ablate all but CIRCUIT",
    "ablate SITES except GROUP",
)

COMPLETENESS = _circuit_effect(
    "completeness",
    "the share of the metric that is left without a circuit: 0 if the circuit is complete",
    "ablate CIRCUIT",
    "ablate GROUP",
    is_shown_by_zero=True,
)

MINIMALITY = _effect(
    EffectKind(
        name="minimality",
        meaning="the faithfulness that a circuit loses without one of its edges",
        formula="(m(circuit) − m(patched)) / (m(base) − m(∅)), of the means; ∅: every edge ablated",
        numerator=lambda patched, base, source: base - patched,
        denominator=lambda patched, base, source: source,
        divisor="m(base) − m(∅)",
        circuit="ablate all but CIRCUIT without each edge",
        from_circuit=True,
        zero="circuit",
        scale_free=True,
    )
)

RELATIVE = _effect(
    EffectKind(
        name="relative",
        meaning="the change caused by the intervention, relative to the base run's value",
        formula="(m(patched) − m(base)) / |m(base)|, of the means",
        numerator=lambda patched, base, source: patched - base,
        denominator=lambda patched, base, source: base,
        divisor="m(base)",
        absolute=True,
        per_prompt_formula="mean of (m(patched) − m(base)) / |m(base)| over prompts",
        zero="base run",
        scale_free=True,
    )
)
