"""Training of a sparse autoencoder: reading its vectors, and its steps, against bare PyTorch.

    python -m benchmarks.training [--prompts 512] [--steps 30] [--rounds 3] [--threads 1]
                                  [--device cpu]

The model has GPT-2 small's shape, the prompts have 32 tokens, and the dictionary has 4,096 top-k
features of the output of layer 6. Reading is compared with the multiply-adds of seven blocks, at
the rate of this machine's large matrix products, and with a loop with a hook over batches of 32
prompts. A step is compared with the same loss, Adam and batches on the same vectors, written down
in PyTorch. Both train to the same weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.bound import unpatched
from benchmarks.features import LAYER, WIDTH, WORDS, make_model, make_tokenizer
from benchmarks.gpu import finish, large_product
from benchmarks.work import Shape

TOKENS = 32
FEATURES, K, BATCH = 4096, 32, 1024
FILE = """mech 1

model m = local("handed over")

prompts p {{
  rows "rows.jsonl"
  template "{{text}}"
  answer "w1"
  split 90%
}}

basis f = fit(
  sae(features: {features}, k: {k}), prompts: p.train, steps: {steps}, batch: {batch},
  validation: 0%
) at resid_post layer {layer} at tokens *

experiment e {{
  prompts p.test
  ablate feature 0 of f at last token with zero
  measure logit(answer) as delta
}}
"""


def write_rows(folder: Path, prompts: int) -> None:
    """Write prompts of random words."""
    random = torch.Generator().manual_seed(1)
    drawn = torch.randint(WORDS, (prompts, TOKENS - 1), generator=random).tolist()
    lines = [json.dumps({"text": " ".join(f"w{n}" for n in row)}) for row in drawn]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_vectors(folder: Path, module: Any, steps: int) -> Any:
    """Return the vectors of the training that the file declares."""
    from mechdsl.base.text import Source, Span
    from mechdsl.checks.file_check import check_source
    from mechdsl.diagnostics.core import has_errors
    from mechdsl.execute.training import RowVectors
    from mechdsl.loading.loader import adopt_model
    from mechdsl.pipeline.trained_files import fits_of_file
    from mechdsl.program import spec
    from mechdsl.resolve.types import ModelContext

    loaded, found = adopt_model("m", module, make_tokenizer())
    if loaded is None or loaded.tokenizer is None:
        raise RuntimeError(str(found))
    text = FILE.format(features=FEATURES, k=K, batch=BATCH, steps=steps, layer=LAYER)
    source = Source(text, folder / "training.mech")
    said = spec.Model(span=Span(source, 0, 0), name="m", kind="local", path="")
    context = ModelContext(said, loaded.shape, loaded.tokenizer)
    checked = check_source(source, models={"m": context})
    if has_errors(checked.diagnostics):
        raise RuntimeError(str(checked.diagnostics))
    (declared,) = fits_of_file(checked).values()
    return RowVectors(declared.training, loaded, 0, None)


def read_by_hook(module: Any, ids: Tensor) -> Tensor:
    """Return [vector, width]: the output of the layer, with 32 prompts in a pass."""
    caught: list[Tensor] = []

    class Done(Exception):
        """Ends a pass after the layer."""

    def keep(_: Any, __: Any, out: Any) -> None:
        caught.append((out[0] if isinstance(out, tuple) else out).flatten(0, 1).clone())
        raise Done

    handle = module.transformer.h[LAYER].register_forward_hook(keep)
    try:
        with torch.no_grad():
            for batch in ids.split(32):
                with suppress(Done):
                    module(batch)
    finally:
        handle.remove()
    return torch.cat(caught)


def read_chunks(vectors: Any) -> Tensor:
    """Return [vector, width]: all chunks of a training."""
    return torch.cat([vectors.chunk(number)[0] for number in range(vectors.chunks)])


def train_bare(vectors: Tensor, start: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Train as the package does, written down in PyTorch."""
    from mechdsl.base.hashing import stable_hash

    w = {name: own.clone().requires_grad_() for name, own in start.items()}
    optimiser = torch.optim.Adam(w.values(), lr=1e-3)
    order = torch.zeros(0, dtype=torch.long)
    count = len(vectors) // BATCH
    for step in range(steps):
        if step % count == 0:
            random = torch.Generator()
            random.manual_seed(stable_hash(0, "order", step // count) % 2**63)
            order = torch.randperm(len(vectors), generator=random).to(vectors.device)
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, (1 - step / steps) / 0.2)
        at = step % count * BATCH
        x = vectors[order[at : at + BATCH]]
        z = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        top = z.topk(K, dim=1)
        f = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
        loss = (x - f @ w["W_dec"] - w["b_dec"]).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            w["W_dec"] /= w["W_dec"].norm(dim=1, keepdim=True)
    return {name: own.detach() for name, own in w.items()}


def train_package(vectors: Tensor, steps: int) -> tuple[dict[str, Tensor], Callable[[], Any]]:
    """Return the first weights, and a function that trains."""
    from mechdsl.fits.training import Training, TrainingSettings
    from mechdsl.program.trainers import TRAINERS

    options = {"features": FEATURES, "k": K}

    class Fixed:
        """All vectors in one chunk."""

        chunks = 1

        def chunk(self, number: int) -> tuple[Tensor, Tensor]:
            """Return the vectors."""
            return vectors, vectors

    def make() -> Any:
        random = torch.Generator().manual_seed(0)
        return TRAINERS["sae"].start((WIDTH, WIDTH), options, random, vectors.device)

    def train() -> dict[str, Tensor]:
        model, empty = make(), vectors[:0]
        settings = TrainingSettings(steps, BATCH, 1e-3, 0)
        Training(model, Fixed(), (empty, empty), settings, lambda x, y: (x, y)).run(
            lambda step: None
        )
        return model.weights()

    return make().weights(), train


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and the result."""
    begin = perf_counter()
    found = work()
    if torch.cuda.is_available():
        finish("cuda")
    return perf_counter() - begin, found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    module = make_model().to(given.device)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, round(given.prompts / 0.9))
        vectors = make_vectors(folder, module, given.steps)
        report(module, vectors, given.steps, given.rounds)


def report(module: Any, vectors: Any, steps: int, rounds: int) -> None:
    """Time both, in turn, and print medians and ratios."""
    from mechdsl.execute.training import VectorCache

    sample = vectors.declared.sample
    ids = torch.tensor([row.ids for row in sample.run.rows], device=module.device)
    shape = Shape(LAYER + 1, 12, WIDTH, WORDS + 3)
    adds = len(ids) * unpatched(shape, ids.shape[1])
    rate = large_product(str(module.device.type))
    read, hook = [], []
    found = expected = torch.zeros(0)
    for _ in range(rounds):
        anew = replace(vectors, cache=VectorCache())  # without the vectors that it keeps
        own, found = timed(partial(read_chunks, anew))
        by_hook, expected = timed(lambda: read_by_hook(module, ids))
        read.append(own)
        hook.append(by_hook)
    difference = float((found.sort(0).values - expected.sort(0).values).abs().max())
    bound = adds / rate
    print(f"reading {len(found):,} vectors: {median(read):.2f} s, by a hook {median(hook):.2f} s")
    print(f"  share of the bound: {bound / median(read):.2f}; largest difference {difference:.1e}")
    centred = found - found.mean(0)
    start, train = train_package(centred, steps)
    package, bare = [], []
    trained: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    for _ in range(rounds):
        own, trained = timed(train)
        by_hand, written = timed(lambda: train_bare(centred, start, steps))
        package.append(own)
        bare.append(by_hand)
    difference = max(float((trained[each] - written[each]).abs().max()) for each in written)
    print(f"{steps} steps: {median(package):.2f} s, bare PyTorch {median(bare):.2f} s")
    ratio = median(bare) / median(package)
    print(f"  throughput: {ratio:.2f} of the bare loop; largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
