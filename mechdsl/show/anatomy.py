"""Output of `mechdsl sites`: blocks and sites, checks, and applicable planner passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from rich.console import Console
from rich.table import Table

from mechdsl.base.text import count_noun
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.forward.hooks.model import BlockStack, CheckOutcome, LoadedModel
from mechdsl.loading.anatomy_proof import describe_idle_components
from mechdsl.loading.verify.checks import PACKED_IDENTITY
from mechdsl.models.shape import Anatomy, HookPoint, list_by_layer, unit_count, vector_width
from mechdsl.planner.passes import RESTART_PASSES
from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES, SITES


def print_sites(model: LoadedModel, problems: Sequence[Diagnostic], console: Console) -> None:
    """Print blocks, heads, sites with their tensors, norms, checks and planner passes."""
    for name in ("", *model.others):
        stack = model.stack(name)
        title = f"{model.shape.architecture}, {name}" if name else model.shape.architecture
        console.print(title, style="bold", highlight=False)
        console.print(_sizes(stack), highlight=False, soft_wrap=True)
        console.print(_norms(stack.anatomy), highlight=False, soft_wrap=True)
        console.print()
        console.print(_sites(stack))
        for site, reason in stack.anatomy.without.items():
            console.print(f"  no `{site}`: {reason}", highlight=False, soft_wrap=True)
        console.print()
    console.print(_checks(model.checks))
    console.print()
    if model.idle:
        console.print(
            f"without effect: {describe_idle_components(model)}", highlight=False, soft_wrap=True
        )
        console.print()
    console.print(_passes(model, problems), highlight=False, soft_wrap=True)


def sites_document(model: LoadedModel, problems: Sequence[Diagnostic]) -> dict[str, Any]:
    """Return the output of `print_sites` as JSON."""
    return {
        "architecture": model.shape.architecture,
        "dtype": model.provenance["dtype"],
        "stacks": {
            name: {
                "layers": stack.shape.n_layers,
                "heads": _collapse([block.heads for block in stack.shape.blocks]),
                "key_value_heads": _collapse([block.kv_heads for block in stack.shape.blocks]),
                "head_width": _collapse([block.d_head for block in stack.shape.blocks]),
                "width": stack.shape.d_model,
                "experts": stack.shape.n_experts,
                "parallel": stack.anatomy.parallel,
                "causal": stack.shape.causal,
                "sites": {
                    site: {
                        "units": _collapse(_site_units(stack, site)),
                        "width": _collapse(_site_widths(stack, site)),
                        "layers": _layers(stack, site),
                        "tensor": _tensor(stack.anatomy, site),
                    }
                    for site in _site_names(stack)
                },
                "without": dict(stack.anatomy.without),
                "without_effect": [
                    {"site": site, "layer": layer} for own, site, layer in model.idle if own == name
                ],
            }
            for name in ("", *model.others)
            for stack in (model.stack(name),)
        },
        "checks": [
            {
                "identity": one.identity,
                "passed": one.passed,
                # JSON has no infinity.
                "error": one.error if one.error < float("inf") else None,
                "tolerance": one.tolerance,
            }
            for one in model.checks
        ],
        "passes": list(RESTART_PASSES) if model.restartable else [],
        "warnings": [f"{one.code}: {one.message}: {one.label_text}" for one in problems],
    }


def _collapse(numbers: Sequence[int] | None) -> int | Sequence[int] | None:
    """Return the number of every layer, or the list of all if layers differ."""
    return numbers[0] if numbers and len({*numbers}) == 1 else numbers


def _sizes(stack: BlockStack) -> str:
    shape = stack.shape
    words = [f"{count_noun(shape.n_layers, 'block')} of width {shape.d_model}"]
    if "z" in shape.sites:
        heads, keys, width, value, _ = map(
            list_by_layer, zip(*map(astuple, shape.blocks), strict=True)
        )
        noun = "head" if heads == "1" else "heads"
        of_values = f" (values of {value})" if value != width else ""
        words.append(f"{heads} {noun} of {width}{of_values}, {keys} key-value heads")
    if "mlp_hidden" in shape.sites:
        layers = sorted(shape.partly.get("mlp_hidden", range(shape.n_layers)))
        neurons = list_by_layer([shape.blocks[layer].neurons for layer in layers])
        words.append(f"{neurons} neurons")
    if shape.n_experts:
        words.append(f"{shape.n_experts} experts")
    if shape.vocab_size:
        words.append(f"{shape.vocab_size} tokens or labels")
    if shape.d_logits:
        words.append(f"logits of {shape.d_logits} labels")
    words.append("no token sees a later one" if shape.causal else "every token sees every other")
    return "  " + ", ".join(words)


def _norms(anatomy: Anatomy) -> str:
    """Describe the positions of norms in the first block."""
    block = anatomy.blocks[0]
    if anatomy.parallel:
        how = "attention and MLP in parallel"
    elif block.middle is not None:
        how = "norms of the sums"
    else:
        how = "attention, then the MLP"
    places = {
        "before attention": block.attn_norm,
        "before the MLP": block.mlp_norm,
        "after attention": block.attn_output_norm,
        "after the MLP": block.mlp_output_norm,
        "of resid_pre + attn_out": block.middle,
        "of resid_mid + mlp_out": block.end,
        "last": anatomy.final_norm,
    }
    start = len(block.path) + 1
    said = [
        f"{place} `{path[start:] if path.startswith(block.path + '.') else path}`"
        for place, path in places.items()
        if path is not None
    ]
    return f"  {how}; norms: {', '.join(said) or 'none'}"


def _site_names(stack: BlockStack) -> list[str]:
    return [site for site in SITES if site in stack.shape.sites]


def _site_units(stack: BlockStack, site: str) -> list[int]:
    """Return the number of units of a site in each of its layers."""
    layers = _layers(stack, site) if SITES[site].has_layer else [None]
    return [unit_count(stack.shape, site, layer) for layer in layers]


def _site_widths(stack: BlockStack, site: str) -> list[int] | None:
    """Return the width of a site in each of its layers; None for vectors over the tokens of a
    prompt."""
    if SITES[site].width == "key":
        return None
    layers = _layers(stack, site) if SITES[site].has_layer else [None]
    return [vector_width(stack.shape, site, layer) for layer in layers]


def _layers(stack: BlockStack, site: str) -> list[int]:
    """Return the layers with a site; the config determines those within attention."""
    if site not in ATTENTION_INTERNAL_SITES:
        return list(stack.anatomy.layers(site))
    return [layer for layer in range(stack.shape.n_layers) if stack.shape.has(site, layer)]


def _sites(stack: BlockStack) -> Table:
    table = Table(box=None, padding=(0, 2), show_edge=False)
    for title in ("site", "per layer", "layers", "tensor"):
        table.add_column(title, overflow="fold")
    for site in _site_names(stack):
        count = list_by_layer(_site_units(stack, site))
        axis = SITES[site].unit
        widths = _site_widths(stack, site)
        size = "[key]" if widths is None else f"[{' or '.join(map(str, dict.fromkeys(widths)))}]"
        if axis is not None:
            word = {"kv_head": "key-value heads"}.get(axis, f"{axis}s")
            size = f"{count} {word}" if size == "[1]" else f"{count} {word} × {size}"
        layers = _layers(stack, site)
        every = len(layers) == stack.shape.n_layers
        where = "" if not layers else "all" if every else ", ".join(map(str, layers))
        table.add_row(site, size, where, _tensor(stack.anatomy, site))
    return table


def _tensor(anatomy: Anatomy, site: str) -> str:
    """Return the module whose input or output the site is, in the first block with the site."""
    if site in ATTENTION_INTERNAL_SITES:
        return "inside the computation of attention"
    layers = anatomy.layers(site)
    tap = anatomy.tap(site, layers[0] if layers else None)
    if tap is None:
        return "what the model returns"
    path = tap.path
    if layers:
        block = anatomy.blocks[layers[0]].path
        parent = block.rpartition(".")[0]
        path = parent + ".{layer}" + path.removeprefix(block)
    return _tensor_note(site, tap, path, anatomy)


def _tensor_note(site: str, tap: HookPoint, path: str, anatomy: Anatomy) -> str:
    side = "input" if tap.side == "in" else "output"
    if tap.patches is not None:
        return f"output of {tap.patches}, before positions are added"
    if site == "head_out":
        return f"per-head contributions to the {side} of {path}"
    if site == "resid_mid" and anatomy.blocks[0].middle is None:
        return f"resid_pre + the {side} of {path}"
    factor = f"{tap.scale:g} × " if tap.scale != 1 else ""
    if tap.scaled_by is not None:
        name = tap.scaled_by.rpartition(".")[2]
        factor += f"tanh({name}) × " if tap.squashed else f"{name} × "
    return f"{factor}{side} of {path}"


def _checks(checks: Sequence[CheckOutcome]) -> Table:
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("check", overflow="fold")
    table.add_column("off by", justify="right", no_wrap=True)
    table.add_column("at most", justify="right", no_wrap=True)
    table.add_column("")
    for one in checks:
        outcome = "holds" if one.passed else "does not hold"
        table.add_row(one.identity, f"{one.error:.1e}", f"{one.tolerance:.0e}", outcome)
    return table


def _passes(model: LoadedModel, problems: Sequence[Diagnostic]) -> str:
    if model.restartable:
        return f"planner passes: all ({', '.join(RESTART_PASSES)} and those that need no restart)"
    reason = next((one.label_text for one in problems if one.code == "W0711"), "")
    failed = next((one for one in model.checks if one.identity == PACKED_IDENTITY), None)
    reason = reason or (failed.failure if failed is not None else "")
    lost = ", ".join(RESTART_PASSES)
    return f"planner passes: every row is a full forward pass ({reason}); {lost} do not apply"
