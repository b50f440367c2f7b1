"""The distinct rows of one pass, and what acts in them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from mechdsl.base.arrays import Ints
from mechdsl.execute.while_writing import WhileWriting
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.plan.restart import Held
from mechdsl.prompts.prompt_table import Run


@dataclass(frozen=True, eq=False)
class PassRows:
    """What runs in one pass; each distinct row once per draw of noise, draws side by side."""

    run: Run
    batch: Ints
    prompts: Ints
    draw: Ints
    acting: RuleWrites = field(default_factory=RuleWrites)
    held: Held | None = None
    beside: RuleWrites = field(default_factory=RuleWrites)
    """Of held rows, the rules beside their path: what is held is what these leave."""
    whole: bool = False
    """Nothing of an unpatched run stands in them."""
    later: WhileWriting = field(default_factory=WhileWriting)
    """What acts while they write."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def all_logits(self) -> bool:
        """Whether logits are written."""
        return any(write.site == "logits" for write in self.acting.writes)

    def joined(self, part: PassRows, at: Ints) -> PassRows:
        """With what a part's rows write, which are the rows `at`."""
        where = torch.from_numpy(at)
        held = self.held
        if part.held is not None:
            none = np.zeros(len(self), dtype=np.bool_)
            held = Held(none, none, none) if held is None else held
            held = Held(held.rows.copy(), held.mlps.copy(), held.norms.copy())
            for every, own in (
                (held.rows, part.held.rows),
                (held.mlps, part.held.mlps),
                (held.norms, part.held.norms),
            ):
                every[at] = own
        return replace(
            self,
            acting=self.acting.then(part.acting.moved(where)),
            held=held,
            beside=self.beside.then(part.beside.moved(where)),
            whole=self.whole or part.whole,
            later=self.later.then(part.later.moved(where)),
        )
