"""Measures accuracy on held-out texts: `python -m zoo.nested.evaluate`.

The last bracket of texts of brackets, by the model of the first stage and by that of both; and
whether verbs have the number of their noun, whichever verb is said.
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaForCausalLM

from zoo import MODELS, language
from zoo.commands import Tally, evaluate_command
from zoo.nested.data import BRACKETS, INTRANSITIVE, SENTENCES, TRANSITIVE, stream

SEED = 20264  # not the training seed; only held-out texts are drawn
SINGULAR = {pair[0] for pair in (*INTRANSITIVE, *TRANSITIVE)}
PLURAL = {pair[1] for pair in (*INTRANSITIVE, *TRANSITIVE)}


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Accuracy by kind of text, `n` held-out texts of each (of single nouns as many as there
    are)."""
    model, tokenizer = language.load(LlamaForCausalLM, folder)
    formal, _ = language.load(LlamaForCausalLM, folder / "formal")
    tallies: dict[str, Tally] = {}
    texts = language.different(stream(seed, BRACKETS, held_out=True), n)
    for name, asked in ((f"{BRACKETS}, first stage", formal), (f"{BRACKETS}, both stages", model)):
        tallies[name] = Tally()
        for _, wanted, found in language.best_words(asked, tokenizer, texts):
            tallies[name].add(wanted == found)
    for kind in SENTENCES:
        tallies[kind] = Tally()
        drawn = stream(seed, kind, held_out=True)
        texts = language.different(drawn, min(n, 100))
        for _, wanted, found in language.best_words(model, tokenizer, texts):
            numbers = SINGULAR if wanted[-1] in SINGULAR else PLURAL
            tallies[kind].add(found[-1] in numbers)
    return tallies


def main() -> None:
    """The command line."""
    folder = MODELS / "nested"
    evaluate_command(__doc__, evaluate, folder=folder, seed=SEED, counted="texts of each kind")


if __name__ == "__main__":
    main()
