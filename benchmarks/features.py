"""A sweep over features of a sparse autoencoder, against loops with hooks.

    python -m benchmarks.features [--features 2000] [--rounds 3] [--threads 1] [--device cpu]
    python -m benchmarks.features --write-inputs FOLDER
    python -m benchmarks.features --sae-lens FOLDER   # in an environment with sae-lens

The file patches each of 2,000 features at the last token of layer 6 of a model of GPT-2 small's
shape, on 4 prompts of 16 tokens. The plain loop makes one pass per feature over the 4 prompts, with
the source's features computed beforehand. `batched` puts 32 features into one pass. "All rows run"
is without the pass that leaves out rows of inactive features. `--sae-lens` times the loop with the
classes of SAELens. All must agree; checking and loading aren't timed,
planning is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYER, WIDTH, PROMPTS, TOKENS = 6, 768, 4, 16
DICTIONARY = 24_576
"""Features of the dictionary, as in the public ones of GPT-2 small."""
AT_ONCE = 32
"""Features of a pass of the batched loop."""
WORDS = 200
FILE = """mech 1

model m = local("handed over")

prompts p {{
  rows "rows.jsonl"
  template "{{clean}}"
  answer " {{right}}"
  wrong " {{rival}}"
  corrupt other {{ clean = other }}
}}

basis b = sae("dictionary") at resid_post layer {layer}

experiment sweep {{
  prompts p
  from other into clean
  patch feature 0..{last} of b at last token
  measure logit(answer) - logit(wrong) as delta
  stats bootstrap(100)
}}
"""


def make_model() -> Any:
    """Return a model of GPT-2 small's shape with random weights, in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=WORDS + 3, bos_token_id=1, eos_token_id=0, pad_token_id=0)
    model: Any = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith("weight") and weights.dim() == 2:
                weights.mul_(2)
    return model.eval()


def write_inputs(folder: Path) -> None:
    """Write the prompts and a dictionary whose features are active on 1 of 20 vectors."""
    random = torch.Generator().manual_seed(1)
    (folder / "dictionary").mkdir(parents=True, exist_ok=True)
    drawn = torch.randint(WORDS, (PROMPTS, 2, TOKENS - 1), generator=random).tolist()
    ends = torch.randint(WORDS, (PROMPTS, 2), generator=random).tolist()
    rows = [
        {
            "clean": " ".join(f"w{n}" for n in clean),
            "other": " ".join(f"w{n}" for n in other),
            "right": f"w{answer}",
            "rival": f"w{wrong}",
        }
        for (clean, other), (answer, wrong) in zip(drawn, ends, strict=True)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    decoder = torch.randn(DICTIONARY, WIDTH, generator=random)
    decoder /= decoder.norm(dim=1, keepdim=True)
    weights = {
        "W_dec": decoder,
        "W_enc": decoder.T.contiguous(),
        "b_enc": torch.full((DICTIONARY,), -1.0),
        "b_dec": torch.zeros(WIDTH),
    }
    save_file(weights, folder / "dictionary" / "sae_weights.safetensors")
    config = {
        "architecture": "standard",
        "d_in": WIDTH,
        "d_sae": DICTIONARY,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"hook_name": f"blocks.{LAYER}.hook_resid_post"},
    }
    (folder / "dictionary" / "cfg.json").write_text(json.dumps(config), encoding="utf-8")


class Inputs:
    """Token ids of the prompts, from the rows in `folder`."""

    def __init__(self, folder: Path) -> None:
        lines = (folder / "rows.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        self.clean, self.other = (
            torch.tensor([[1, *map(_token, row[run].split())] for row in rows])
            for run in ("clean", "other")
        )
        self.answers = torch.tensor([_token(row["right"]) for row in rows])
        self.wrong = torch.tensor([_token(row["rival"]) for row in rows])

    def difference(self, logits: Tensor) -> Tensor:
        """Return [row] logit(answer) − logit(wrong), of [row, vocab]."""
        rows = torch.arange(len(logits))
        count = len(logits) // len(self.answers)
        return logits[rows, self.answers.repeat(count)] - logits[rows, self.wrong.repeat(count)]


def _token(word: str) -> int:
    return 3 + int(word[1:])


def make_tokenizer() -> Any:
    """Return a tokenizer with one token per word, and `<s>` before each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{f"w{n}": n + 3 for n in range(WORDS)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )


class MechdslTask:
    """The checked file and the model."""

    def __init__(self, folder: Path, module: Any, features: int) -> None:
        from mechdsl.base.text import Source, Span
        from mechdsl.checks.file_check import check_source
        from mechdsl.diagnostics.core import has_errors
        from mechdsl.loading.loader import adopt_model
        from mechdsl.program import spec
        from mechdsl.resolve.types import ModelContext

        loaded, found = adopt_model("m", module, make_tokenizer())
        if loaded is None or loaded.tokenizer is None:
            raise RuntimeError(str(found))
        self.model = loaded
        text = FILE.format(layer=LAYER, last=features - 1)
        source = Source(text, folder / "features.mech")
        said = spec.Model(span=Span(source, 0, 0), name="m", kind="local", path="")
        context = ModelContext(said, loaded.shape, loaded.tokenizer)
        self.checked = check_source(source, models={"m": context})
        if has_errors(self.checked.diagnostics):
            raise RuntimeError(str(self.checked.diagnostics))

    def run(self, without: frozenset[str] = frozenset()) -> Tensor:
        """Return [feature, prompt] patched values, prompts in the order of the data.

        Args:
            without: Passes of the planner that are switched off.
        """
        from mechdsl.execute.run.panel import execute
        from mechdsl.planner.passes import make_plan
        from mechdsl.results.assembly.collection import check_denominators

        plan = make_plan(self.checked.experiments, without=without)
        found = execute(plan, {"m": self.model}, check=check_denominators)
        if found.diagnostics:
            raise RuntimeError(str(found.diagnostics))
        patched = torch.from_numpy(found.measured["sweep"].patched[0])
        (experiment,) = self.checked.experiments
        values = torch.empty_like(patched)
        values[:, list(experiment.table.row_ids)] = patched
        return values


class Loop:
    """Passes with a hook behind layer 6, on a bare model of transformers."""

    def __init__(self, inputs: Inputs, module: Any, encode: Any, decode: Any) -> None:
        self.inputs, self.module, self.encode, self.decode = inputs, module, encode, decode
        block = module.transformer.h[LAYER]
        caught: list[Tensor] = []
        handle = block.register_forward_hook(lambda _, __, out: caught.append(_hidden(out)))
        with torch.no_grad():
            module(inputs.other)
        handle.remove()
        self.source = encode(caught[0][:, -1])

    def run(self, features: int, at_once: int) -> Tensor:
        """Return [feature, prompt] patched values, with `at_once` features in a pass."""
        with self.module.device:
            return self._run(features, at_once)

    def _run(self, features: int, at_once: int) -> Tensor:
        block = self.module.transformer.h[LAYER]
        found: list[Tensor] = []
        for begin in range(0, features, at_once):
            count = min(at_once, features - begin)

            def hook(_: Any, __: Any, out: Any, begin: int = begin, count: int = count) -> Any:
                hidden = _hidden(out).clone()
                now = hidden[:, -1]
                acts = self.encode(now)
                error = now - self.decode(acts)
                rows = torch.arange(len(acts))
                which = begin + torch.arange(count).repeat_interleave(PROMPTS)
                acts[rows, which] = self.source.repeat(count, 1)[rows, which]
                hidden[:, -1] = self.decode(acts) + error
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

            handle = block.register_forward_hook(hook)
            with torch.no_grad():
                logits = self.module(self.inputs.clean.repeat(count, 1)).logits[:, -1]
            handle.remove()
            found.append(self.inputs.difference(logits).view(count, PROMPTS))
        return torch.cat(found).double().cpu()


def _hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def own_encoder(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """Return the encoder and the decoder, written by hand."""
    w = load_file(folder / "dictionary" / "sae_weights.safetensors", device)
    return (
        lambda x: ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu(),
        lambda acts: acts @ w["W_dec"] + w["b_dec"],
    )


def sae_lens_encoder(folder: Path) -> tuple[Any, Any]:
    """Return the encoder and the decoder of the class of SAELens."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    made: Any = SAE.load_from_disk(str(folder / "dictionary"))
    return made.encode, made.decode


def compare(ways: dict[str, Callable[[], Tensor]], rounds: int, tolerance: float) -> None:
    """Time each way in turns, print seconds and ratios, and check that the values agree."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = perf_counter()
            values[name] = way()
            seconds[name].append(perf_counter() - start)
    first = next(iter(ways))
    for name, taken in seconds.items():
        ratios = sorted(a / b for a, b in zip(taken, seconds[first], strict=True))
        print(f"{name:24} {median(taken):8.2f} s   {median(ratios):6.1f} x {first}")
        torch.testing.assert_close(values[name], values[first], atol=tolerance, rtol=tolerance)
    moved = float(values[first].std(dim=0).max())
    print(f"all agree; standard deviation of the values over features {moved:.3f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--features", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write-inputs", type=Path)
    parser.add_argument("--sae-lens", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.write_inputs is not None:
        write_inputs(given.write_inputs)
        return
    if given.sae_lens is not None:
        inputs, module = Inputs(given.sae_lens), make_model()
        own, other = own_encoder(given.sae_lens), sae_lens_encoder(given.sae_lens)
        plain, lens = (Loop(inputs, module, *each) for each in (own, other))
        ways = {
            "plain, batched": lambda: plain.run(given.features, AT_ONCE),
            "SAELens, batched": lambda: lens.run(given.features, AT_ONCE),
        }
        compare(ways, given.rounds, 1e-4)
        return
    with TemporaryDirectory() as made:
        folder = Path(made)
        write_inputs(folder)
        module = make_model().to(given.device)
        task = MechdslTask(folder, module, given.features)
        with torch.device(given.device):
            plain = Loop(Inputs(folder), module, *own_encoder(folder, given.device))
        ways = {
            "mechdsl": task.run,
            "mechdsl, all rows run": lambda: task.run(frozenset({"inert"})),
            "plain": lambda: plain.run(given.features, 1),
            "plain, batched": lambda: plain.run(given.features, AT_ONCE),
        }
        compare(ways, given.rounds, 1e-4)


if __name__ == "__main__":
    main()
