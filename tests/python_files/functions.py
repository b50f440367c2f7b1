"""Python functions used by the `.mech` files of this folder."""

import torch


def margin(logits, rows):
    """The answer's logit minus the highest other logit."""
    found = []
    for line, row in zip(logits, rows, strict=True):
        (own,) = row["answer.ids"]
        others = line.clone()
        others[own] = -torch.inf
        found.append(line[own] - others.max())
    return found


def difference(logits, rows):
    """Equals `logit(answer) - logit(rival)`."""
    answer = torch.tensor([row["answer.ids"][0] for row in rows])
    rival = torch.tensor([row["rival.ids"][0] for row in rows])
    each = torch.arange(len(rows))
    return logits[each, answer] - logits[each, rival]


def total(row):
    return row["count"] + len(row["fruits"][0])


def shorter(row):
    return row["count"] - 1


def next_word(row):
    words = ["apple", "pear", "plum", "fig"]
    return words[(words.index(row["item"]) + 1) % 4]


def halved(vectors):
    return vectors * 0.5


def same(vectors):
    return vectors.numpy()


def a_half(vectors):
    return torch.full_like(vectors, 0.5)


def build():
    """A model and its tokenizer."""
    from importlib.resources import files

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(files("mechdsl") / "zoo" / "counting")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def words(replies, rows):
    """Number of words in each reply that equal the row's item."""
    return [text.split().count(row["item"]) for text, row in zip(replies, rows, strict=True)]


class Tied(torch.nn.Module):
    """An autoencoder whose encoder is its transposed decoder."""

    def __init__(self, width, features):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.randn(features, width))

    def loss(self, vectors):
        return (vectors - (vectors @ self.rows.T).relu() @ self.rows).square().sum(1).mean()

    def weights(self):
        width, features = self.rows.T.shape
        bias, center = torch.zeros(features), torch.zeros(width)
        return {"W_enc": self.rows.T, "b_enc": bias, "W_dec": self.rows, "b_dec": center}


class Wavelets:
    """An encoder and its decoder."""

    def __init__(self):
        self.weights = torch.linspace(-1, 1, 12 * 128).view(12, 128).cos()

    def encode(self, vectors):
        return (vectors @ self.weights.T).relu()

    def decode(self, features):
        return features @ self.weights
