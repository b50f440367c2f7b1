"""The structure of a model as numbers and strings.

In: `config.json`, or a module tree. Out: a `ModelShape` (sizes, sites) and an `Anatomy` (the module
of each site). Imports vocab and below; no torch.
"""
