"""What is kept between runs: values of cells, results of runs, hashes of large files.

In: keys, arrays and bytes. Out: the same again, whole or not at all. Imports diagnostics and below;
numpy and safetensors, no torch.
"""
