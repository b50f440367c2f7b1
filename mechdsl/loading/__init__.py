"""Models loaded, taken apart, and proved to be what they are taken for.

In: a folder, a name or a module. Out: a `LoadedModel` that passed its checks, or diagnostics.
Imports packed and below; torch.
"""
