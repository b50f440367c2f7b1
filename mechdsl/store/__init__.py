"""What is kept between runs: values of cells, results of runs, hashes of large files.

In: keys, arrays and bytes. Out: the same again, whole or not at all. Imports base; numpy and
safetensors, no torch.
"""
