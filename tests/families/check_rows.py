"""Check rows of the tables by the reference alone: `python -m tests.families.check_rows NAME…`.

Whoever writes a row runs this first: every site comes by, writing a site's own values changes
nothing, other values do, and the parts of a block add up.
"""

from __future__ import annotations

import sys
import time

import torch

from ..reference import hooks
from . import tables
from .build import model
from .parts import Architecture, Refused


def check(architecture: Architecture) -> list[str]:
    """Descriptions of all statements of a row that don't hold."""
    module = model(architecture)
    wrong: list[str] = []
    stacks = {"": architecture.main, **architecture.others}
    for prompt in hooks.prompts(architecture, 2, seed=0)[1:]:
        for name, stack in stacks.items():
            for layer in range(stack.count):
                wrong += _layer(architecture, module, prompt, name, layer)
    return wrong


def _layer(
    architecture: Architecture, module: torch.nn.Module, prompt: object, name: str, layer: int
) -> list[str]:
    stack = architecture.others[name] if name else architecture.main
    at = f"{name} layer {layer}".strip()
    plain, seen = hooks.run(architecture, module, prompt, layer, stack=name)
    with torch.no_grad():
        output = module(**prompt)
    bare = (output.logits if "logits" in output else output.last_hidden_state)[0]
    wrong: list[str] = []

    def differ(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))

    if (error := differ(plain, bare)) > 1e-5:
        wrong.append(f"{at}: reading changes the output by {error:.1e}")
    missing = set(hooks.sites(stack, layer, main=not name)) ^ set(seen)
    if missing:
        wrong.append(f"{at}: {sorted(missing)} were not read")
    for site in seen:
        value = seen[site]
        positions = range(value.shape[0])
        own = [hooks.Change(p, u, value[p, u]) for p in positions for u in range(value.shape[1])]
        same, _ = hooks.run(architecture, module, prompt, layer, site, own, name)
        if (error := differ(same, bare)) > 1e-4:
            wrong.append(f"{at}: own values of {site} change the output by {error:.1e}")
        other = [
            hooks.Change(c.position, c.unit, -2 * c.vector)
            for c in own
            if c.position == len(positions) - 1 or name or architecture.takes == "image"
        ]
        far, _ = hooks.run(architecture, module, prompt, layer, site, other, name)
        if differ(far, bare) < 1e-3:
            wrong.append(f"{at}: other values of {site} change nothing")
    block = stack.at(layer)
    outs = [site for site in ("attn_out", "mixer_out", "mlp_out") if site in seen]
    if "attn_out" in outs and "mixer_out" in outs:
        outs.remove("mixer_out")
    if (
        block.adds_up
        and "resid_pre" in seen
        and block.middle in ("sum", "none")
        and not architecture.others.get("cross")
    ):
        total = seen["resid_pre"] + sum(seen[site] for site in outs)
        if (error := differ(total, seen["resid_post"])) > 1e-4:
            wrong.append(f"{at}: resid_pre + {' + '.join(outs)} is not resid_post ({error:.1e})")
    return wrong


def main(names: list[str]) -> None:
    for entry in tables.every():
        if names and entry.name not in names:
            continue
        if isinstance(entry, Refused):
            print(f"{entry.name}: refused, {entry.reason}")
            continue
        start = time.time()
        try:
            wrong = check(entry)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        print(f"{entry.name}: {'; '.join(wrong[:6]) or 'holds'} ({time.time() - start:.1f} s)")


if __name__ == "__main__":
    main(sys.argv[1:])
