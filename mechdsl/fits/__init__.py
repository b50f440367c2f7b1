"""Fits to vectors of rows: means, principal components, linear probes, similarities, ranks,
sparse dictionaries, factorizations, components, correlations, mixtures, rotations, steering
vectors, scales, gates, lenses, and what their trainings report.

In: arrays of vectors and targets, [row, width]. Out: weights, directions, held-out predictions,
numbers. Imports base, numpy and scipy; torch only in `training`, `sparse_training`, `factors`,
`correlations`, `lenses`, `vectors` and `gates`; scikit-learn only inside functions of `factors`,
torch and accelerate only inside functions of `processes`.
"""
