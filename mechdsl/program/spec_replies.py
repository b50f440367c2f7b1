"""What a model writes behind its prompts, as typed data."""

from __future__ import annotations

import json

from mechdsl.base.plural import plural
from mechdsl.program.spec_fields import ArgumentText, EndText, Spec


class RepliesOf(Spec):
    """`with replies of writes(c: 1)`: what another experiment wrote stands behind the prompts."""

    of: str
    cell: tuple[ArgumentText, ...] = ()
    """Which of its cells wrote them."""

    @property
    def text(self) -> str:
        return f"replies of {' '.join(self.span.written.split())}"


class Generation(Spec):
    """`generate 40 with temperature 0.7, samples 3 until "\\n"`."""

    tokens: int
    """What a reply has at most."""
    temperature: float | None = None
    """None: the most likely token is taken, and nothing is drawn."""
    top_k: int | None = None
    top_p: float | None = None
    samples: int = 1
    stops: tuple[str, ...] = ()
    """Texts in front of which a reply ends."""

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature is not None

    @property
    def drawn(self) -> tuple[str, ...]:
        """How tokens are drawn, in words; nothing where they aren't."""
        if self.temperature is None:
            return ()
        said = [f"drawn at temperature {self.temperature:g}"]
        said += [f"of the {self.top_k:,} likeliest"] if self.top_k is not None else []
        said += [f"of those with {100 * self.top_p:.4g} % in all"] if self.top_p is not None else []
        return tuple(said)

    @property
    def how(self) -> str:
        """All of it in a few words."""
        said = [f"up to {plural(self.tokens, 'token')}", *self.drawn]
        said += [f"{self.samples:,} samples"] if self.samples > 1 else []
        if self.stops:
            said.append("until " + " or ".join(map(json.dumps, self.stops)))
        return ", ".join(said)

    def key(self, seed: int) -> tuple[object, ...]:
        """What replies hang on, beside the model, the prompts and the rules. seed: the file's."""
        drawn = None if self.temperature is None else (self.temperature, seed, self.samples)
        return (self.tokens, drawn, self.top_k, self.top_p, self.stops)


class During(Spec):
    """`during step 2..5`: the steps of a reply in which a rule acts. Step 0 is the prefill."""

    first: int | EndText
    """A number, or one that hangs on a `for`."""
    last: int | EndText
    """Inclusive."""
    after_prefill: bool = False
    """It edits what is kept of the prompt, between step 0 and step 1."""
