"""Interventions in prompts with images by plain hooks: one unpadded prompt at a time, with the
pixels that the model's own processor returns."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

Edit = Callable[[Tensor], Tensor]
"""[tokens, width] → edited values of the same shape."""


class Bare:
    """A model and its processor, as transformers loads them."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor
        self.image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)

    @staticmethod
    def of_folder(folder: Path) -> Bare:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model: Any = AutoModelForImageTextToText.from_pretrained(folder)
        return Bare(model, AutoProcessor.from_pretrained(folder))

    def inputs(self, text: str, images: Sequence[Path]) -> dict[str, Tensor]:
        """The inputs of one prompt; `<image>` in the text marks each image."""
        return self.with_pictures(text, [Image.open(file).convert("RGB") for file in images])

    def with_pictures(self, text: str, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        text = text.replace("<image>", self.processor.image_token)
        images = [[*pictures]] if pictures else None
        given = dict(self.processor(text=[text], images=images, return_tensors="pt"))
        return {name: value for name, value in given.items() if name != "labels"}

    def image_tokens(self, inputs: dict[str, Tensor]) -> list[int]:
        """The positions of the vectors of images."""
        return [
            n for n, token in enumerate(inputs["input_ids"][0].tolist()) if token == self.image_id
        ]

    @property
    def language(self) -> Any:
        inner = self.model.model
        return getattr(inner, "language_model", None) or inner.text_model

    def block(self, layer: int) -> Any:
        return self.language.layers[layer]

    def run(
        self,
        inputs: dict[str, Tensor],
        *,
        blocks: dict[int, Edit] | None = None,
        heads: dict[int, Edit] | None = None,
        embed: Edit | None = None,
        blocked: dict[int, Sequence[int]] | None = None,
        queries: Sequence[int] = (-1,),
    ) -> Tensor:
        """The logits [tokens, vocabulary], with the outputs of blocks, the inputs of output
        projections (all heads side by side) and the embeddings changed. `blocked`: by layer, the
        tokens that `queries` don't attend to."""

        def after(edit: Edit) -> Callable[[Any, Any, Any], Any]:
            def hook(module: Any, args: Any, output: Any) -> Any:
                value = output[0] if isinstance(output, tuple) else output
                changed = edit(value[0].clone())[None]
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            return hook

        def before(edit: Edit) -> Callable[[Any, Any], Any]:
            return lambda module, args: (edit(args[0][0].clone())[None], *args[1:])

        def entering(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            assert embed is not None
            value = kwargs["inputs_embeds"]
            return args, {**kwargs, "inputs_embeds": embed(value[0].clone())[None]}

        with ExitStack() as stack, torch.no_grad():
            for layer, edit in (blocks or {}).items():
                handle = self.block(layer).register_forward_hook(after(edit))
                stack.callback(handle.remove)
            for layer, edit in (heads or {}).items():
                output = self.block(layer).self_attn.o_proj
                stack.callback(output.register_forward_pre_hook(before(edit)).remove)
            for layer, tokens in (blocked or {}).items():
                handle = self.block(layer).self_attn.register_forward_pre_hook(
                    masked(tokens, queries), with_kwargs=True
                )
                stack.callback(handle.remove)
            if embed is not None:
                handle = self.language.register_forward_pre_hook(entering, with_kwargs=True)
                stack.callback(handle.remove)
            return self.model(**inputs).logits[0]

    def reply(self, inputs: dict[str, Tensor], count: int, **edits: Any) -> list[int]:
        """Greedy tokens, each from a full forward pass."""
        found: list[int] = []
        for _ in range(count):
            found.append(int(self.run(followed(inputs, found), **edits)[-1].argmax()))
        return found

    def states(self, inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """Outputs of blocks, inputs of output projections, and the embeddings, of a clean run."""
        found: dict[str, list[Tensor]] = {"blocks": [], "heads": [], "embed": []}

        def keep(name: str) -> Edit:
            def edit(value: Tensor) -> Tensor:
                found[name].append(value)
                return value

            return edit

        count = len(self.language.layers)
        self.run(
            inputs,
            blocks={layer: keep("blocks") for layer in range(count)},
            heads={layer: keep("heads") for layer in range(count)},
            embed=keep("embed"),
        )
        return found


def followed(inputs: dict[str, Tensor], more: Sequence[int]) -> dict[str, Tensor]:
    """The inputs of a prompt with further tokens of text."""
    ids = inputs["input_ids"]
    own = torch.tensor([more], dtype=torch.long)
    given = {
        name: torch.cat([value, torch.zeros_like(own)], 1) if value.shape == ids.shape else value
        for name, value in inputs.items()
    }
    types = inputs.get("token_type_ids")
    if types is not None and not types.any():  # of a prompt whose tokens all see each other
        given["token_type_ids"] = torch.cat([types, torch.ones_like(own)], 1)
    given["input_ids"] = torch.cat([ids, own], 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    return given


@contextmanager
def edited_module(module: Any, edit: Edit, *, is_input: bool) -> Generator[None]:
    """Change the input or the output of a module; the edit gets a copy, and may flatten it."""

    def changed(value: Tensor) -> Tensor:
        return edit(value.clone()).view(value.shape)

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

    def after(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (changed(output[0]), *output[1:])
        return changed(output)

    if is_input:
        hook = module.register_forward_pre_hook(before, with_kwargs=True)
    else:  # before the library's hooks, which collect the outputs of blocks
        hook = module.register_forward_hook(after, prepend=True)
    try:
        yield
    finally:
        hook.remove()


OpenEdit = Callable[[Edit], AbstractContextManager[None]]
"""Opens an edit of one site."""


def record_value(opened: OpenEdit, run: Callable[[], object]) -> Tensor:
    """Return the value of a site in a run without editing it."""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value)
        return value

    with opened(keep):
        run()
    return found[0]


def one_head(edit: Edit, head: int, width: int) -> Edit:
    """Apply an edit of a head's vectors to the vectors of all heads side by side."""
    own = slice(head * width, (head + 1) * width)

    def change(value: Tensor) -> Tensor:
        value[:, own] = edit(value[:, own])
        return value

    return change


def at(positions: Sequence[int], values: Tensor) -> Edit:
    """Write these vectors at these positions."""

    def edit(value: Tensor) -> Tensor:
        value[list(positions)] = values
        return value

    return edit


def masked(
    tokens: Sequence[int], queries: Sequence[int] = (-1,)
) -> Callable[[Any, Any, dict[str, Any]], Any]:
    """Hide these tokens from the queries, by default the last one, in an attention sublayer."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        count = kwargs["hidden_states"].shape[1] if "hidden_states" in kwargs else args[0].shape[1]
        mask = torch.full((count, count), -torch.inf).triu(1)
        for query in queries:
            mask[query, list(tokens)] = -torch.inf
        return args, {**kwargs, "attention_mask": mask[None, None]}

    return hook
