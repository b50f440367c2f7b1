"""Models loaded from files or Python, and checks that prove their anatomy.

In: a folder, a name or a module. Out: a `LoadedModel` that passed its checks, or diagnostics.
Imports forward, checks and below; torch.
"""
