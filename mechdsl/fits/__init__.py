"""Fits to vectors of rows: means, principal components, linear probes, similarities, ranks.

In: arrays of vectors and targets, [row, width]. Out: weights, directions, held-out predictions,
numbers. Imports base, numpy and scipy.
"""
