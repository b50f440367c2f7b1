"""What a model looks like, as numbers and strings: nothing here imports torch.

In: `config.json`, or a module tree. Out: a `ModelShape` (sizes, sites) and an `Anatomy` (where each
site is found). Imports vocab and below.
"""
