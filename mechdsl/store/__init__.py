"""The store: cached values of cells, results of runs, hashes of large files.

In: keys, arrays and bytes. Out: the same data; each write is complete or has no effect. Imports
base; numpy and safetensors, no torch.
"""
