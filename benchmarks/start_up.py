"""CPU seconds of starting: commands against the imports that they can't avoid, and the self-check.

python -m benchmarks.start_up                # the commands, then a model of 0.3B parameters
python -m benchmarks.start_up --layers 4 --width 64 --repeats 1
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
WIDTH_OF_HEAD = 64
TINY = """mech 1
model toy = zoo("counting")
prompts fruit {
  count in 1..8
  item in ["apple", "pear"]
  items = list(item, count, sep: " ")
  template "Part 1: {items} Part 2: {items} Count 1:"
  answer " {count}"
  corrupt fewer { count = count - 1 }
}
experiment heads {
  model toy
  prompts fruit limit 16
  from clean into fewer
  patch layer 0..1 head * at last token
  measure logit(answer) - logit(answer of fewer) as recovery
}
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """Name → arguments of Python."""
    tiny = folder / "tiny.mech"
    tiny.write_text(TINY, encoding="utf-8")
    library = "import gc, torch; gc.disable(); import transformers.models.llama.modeling_llama"
    ours = ["-m", "mechdsl"]
    return {
        "import torch": ["-c", "import gc; gc.disable(); import torch"],
        "import torch and its modeling module": ["-c", library],
        "run a tiny file, --no-store": [*ours, "run", "--no-store", str(tiny)],
        "validate one example": [*ours, "validate", str(EXAMPLES / "counting.mech")],
        "validate all examples": [*ours, "validate", str(EXAMPLES)],
    }


def seconds(arguments: list[str]) -> tuple[float, float]:
    """(CPU, wall) of a process of Python."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # Bytecode is kept, as it is where the package is installed.
    own = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *arguments],
        env=own,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    after, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    used = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return used, ended - began


def self_check(layers: int, width: int) -> str:
    """What the self-check of a random Llama in float32 takes, in seconds and in bare passes."""
    import torch

    from mechdsl.loading.loader import adopt_model, import_library

    import_library()
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = width // WIDTH_OF_HEAD
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=16_000,
        max_position_embeddings=512,
    )
    module = LlamaForCausalLM(config).eval()
    words = {f"w{number}": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokens = torch.arange(16).view(2, 8)
    with torch.inference_mode():
        module(tokens)
        began = time.process_time()
        module(tokens)
        bare = time.process_time() - began
    began = time.process_time()
    model, problems = adopt_model("m", module, tokenizer)
    took = time.process_time() - began
    assert model is not None, problems
    size = sum(weight.numel() for weight in module.parameters()) / 1e9
    return (
        f"self-check of {size:.2f}B parameters: {took:.1f} s, that is {took / bare:.0f} bare passes"
        f" over 16 tokens of {bare:.2f} s"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=896)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        every = commands(Path(folder))
        # In turn, so that all share the noise of the machine; the first time compiles.
        rounds = [
            {name: seconds(each) for name, each in every.items()} for _ in range(given.repeats + 1)
        ]
    print("least CPU and wall seconds of", given.repeats)
    for name in every:
        cpu, wall = (min(one[name][which] for one in rounds[1:]) for which in range(2))
        print(f"{cpu:7.2f} {wall:7.2f}  {name}")
    print(self_check(given.layers, given.width))


if __name__ == "__main__":
    main()
