"""Agreement of values with other values, with a truth, and with masks.

The map of a text is one row of tokens, and its mask has one pixel for each token.

References:
    Hanley, J. A. and McNeil, B. J. (1982). The meaning and use of the area under a receiver
        operating characteristic (ROC) curve. Radiology 143, 29-36.
    Spearman, C. (1904). The proof and measurement of association between two things. Am. J.
        Psychol. 15, 72-101.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, Floats


def pixel_patches(size: tuple[int, int], grid: tuple[int, int]) -> NDArray[np.int64]:
    """Return the patch number of each pixel, counted row by row: [height, width].

    A pixel belongs to the patch that contains its centre.

    Args:
        size: Height and width in pixels.
        grid: Rows and columns of patches.

    Raises:
        ValueError: If a side has more patches than pixels.
    """
    (height, width), (rows, cols) = size, grid
    if rows > height or cols > width:
        raise ValueError(f"{rows} x {cols} patches of an image of {height} x {width} pixels")
    down = (2 * np.arange(height) + 1) * rows // (2 * height)
    across = (2 * np.arange(width) + 1) * cols // (2 * width)
    return down[:, None] * cols + across[None, :]


def mask_shares(mask: Bools, grid: tuple[int, int]) -> Floats:
    """Compute the share of each patch's pixels that the mask contains: [row, col]."""
    size = (mask.shape[0], mask.shape[1])
    number = pixel_patches(size, grid).ravel()
    count = grid[0] * grid[1]
    hit = np.bincount(number, weights=mask.ravel().astype(np.float64), minlength=count)
    return (hit / np.bincount(number, minlength=count)).reshape(grid)


def pointing_game(values: Floats, mask: Bools) -> float:
    """Compute the pointing game (Zhang et al. 2018, Top-down neural attention by excitation
    backprop).

    The result is 1 if the largest value of a map is in the mask, else 0. A patch is in the mask if
    at least half of its pixels are. If several patches are largest, the result is the share of them
    that is in the mask. NaN for a map without values.

    Args:
        values: The map, [row, col].
        mask: The mask, [height, width].
    """
    there = np.isfinite(values)
    if not there.any():
        return float("nan")
    peak = there & (values == np.max(values[there]))
    inside = mask_shares(mask, (values.shape[0], values.shape[1])) >= 0.5
    return float(inside[peak].mean())


def mask_auroc(values: Floats, mask: Bools) -> float:
    """Compute how often a patch in the mask has a larger value than a patch outside of it.

    This is the area under the ROC curve (Hanley and McNeil 1982); ties count half. A patch is in
    the mask if at least half of its pixels are. NaN if one of both groups has no values.

    Args:
        values: The map, [row, col].
        mask: The mask, [height, width].
    """
    inside = mask_shares(mask, (values.shape[0], values.shape[1])) >= 0.5
    there = np.isfinite(values)
    true = inside[there]
    return (
        float("nan") if true.all() or not true.any() else float(auroc(values[there][None], true)[0])
    )


def relevance_mass(values: Floats, mask: Bools) -> float:
    """Compute the share of the positive values of a map that is in the mask.

    This is relevance mass accuracy (Arras et al. 2022, arXiv 2003.07258), also called the
    energy-based pointing game (Wang et al. 2020, Score-CAM). A patch that is partly in the mask
    counts by its share of pixels. NaN if no value is positive.

    Args:
        values: The map, [row, col].
        mask: The mask, [height, width].
    """
    above = np.where(values > 0, values, 0.0)
    whole = float(above.sum())
    if whole == 0:
        return float("nan")
    return float((above * mask_shares(mask, (values.shape[0], values.shape[1]))).sum() / whole)


def chance_mass(values: Floats, mask: Bools) -> float:
    """Compute the relevance mass of a map with equal values: the mask's share of the pixels of the
    patches that have a value. NaN for a map without values.

    Args:
        values: The map, [row, col].
        mask: The mask, [height, width].
    """
    numbers = pixel_patches((mask.shape[0], mask.shape[1]), (values.shape[0], values.shape[1]))
    inside = mask[np.isfinite(values).ravel()[numbers]]
    return float(inside.mean()) if inside.size else float("nan")


def iou(values: Floats, mask: Bools, share: float | None = None) -> float:
    """Compute intersection over union, in pixels, of the mask and the largest patches of a map.

    If several patches have equal values and not all of them are selected, each counts fractionally.
    NaN for a map without values.

    Args:
        values: The map, [row, col].
        mask: The mask, [height, width].
        share: The share of the patches with values to select, rounded half up and at least one
            patch. None means the mask's share of the image, so that a difference in size isn't
            penalised.

    Raises:
        ValueError: If the share isn't above 0 and at most 1.
    """
    there = np.isfinite(values)
    if not there.any():
        return float("nan")
    patches = values.size if share is None else int(there.sum())
    share = float(mask.mean()) if share is None else share
    if not 0 <= share <= 1 or (share == 0 and mask.any()):
        raise ValueError(f"a share of {share:g} patches")
    count = min(max(1, int(share * patches + 0.5)), int(there.sum()))
    taken = _taken(values, there, count)
    size = (mask.shape[0], mask.shape[1])
    painted = taken.ravel()[pixel_patches(size, (values.shape[0], values.shape[1]))]
    both = float(painted[mask].sum())
    return both / float(painted.sum() + mask.sum() - both)


def f1(values: Floats, mask: Bools, share: float | None = None) -> float:
    """Compute the F1 score of the largest patches of a map, which should be the mask, in pixels.

    It is the harmonic mean of precision and recall, 2 IoU / (1 + IoU), also called Dice
    coefficient. The arguments and errors are those of `iou`.
    """
    overlap = iou(values, mask, share)
    return 2 * overlap / (1 + overlap)


def _taken(values: Floats, there: Bools, count: int) -> Floats:
    """Return 1 for each of the `count` patches with the largest values: [row, col].

    Ties at the threshold share the remaining count equally.
    """
    last = np.sort(values[there])[-count]
    above, tied = there & (values > last), there & (values == last)
    return above + tied * ((count - above.sum()) / tied.sum())


def area_under_curve(curve: Floats, at: Floats) -> Floats:
    """Compute the area under curves by trapezoids, divided by the range of `at`: their mean height.

    This is the AUC of insertion and deletion (Petsiuk et al. 2018, RISE).

    Args:
        curve: The curves, […, step].
        at: The position of each step, ascending, [step].

    Returns:
        The areas, […].

    Raises:
        ValueError: If there are fewer than 2 steps, or `at` isn't ascending.
    """
    if len(at) < 2 or not (np.diff(at) > 0).all():
        raise ValueError("a curve needs two steps, in ascending order")
    area = np.trapezoid(curve, at, axis=-1) / (at[-1] - at[0])
    # Rounding must not give a constant curve another height: shares of 1 have exact limits.
    return np.clip(area, curve.min(axis=-1), curve.max(axis=-1))


def infidelity(values: Floats, taken: Bools, drops: Floats) -> float:
    """Compute the infidelity of a map (Yeh et al. 2019, definition 2.1).

    This is the mean of (β Σ values of the removed patches − decrease of the output)². A map has no
    inherent scale, so β ≥ 0 minimises the mean (their optimal scaling). NaN if a removed patch has
    no value.

    Args:
        values: The map, [row, col].
        taken: Removed patches, [draw, row, col].
        drops: f(x) − f(x without the patches), [draw].
    """
    expected = np.where(taken, values, 0.0).sum((1, 2))
    squared = float(expected @ expected)
    scale = max(0.0, float(expected @ drops) / squared) if squared > 0 else 0.0
    return float(np.mean((scale * expected - drops) ** 2))


def sensitivity(values: Floats, others: Floats) -> float:
    """Compute how much a map changes at most under small changes of the image.

    This is max ‖other − map‖ (the max-sensitivity of Yeh et al. 2019), divided here by ‖map‖, over
    the patches with values in the map. NaN for a map of zeros, and if another map lacks a value.

    Args:
        values: The map, [row, col].
        others: Maps of similar images, [draw, row, col].
    """
    there = np.isfinite(values)
    length = float(np.linalg.norm(values[there]))
    moved = np.linalg.norm((others - values)[:, there], axis=1)
    return float(moved.max()) / length if length > 0 else float("nan")


def pearson(left: Floats, right: Floats) -> Floats:
    """Return Pearson's correlation of each row."""
    a = left - left.mean(1, keepdims=True)
    b = right - right.mean(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def spearman(left: Floats, right: Floats) -> Floats:
    """Return Spearman's correlation of each row."""
    from scipy.stats import rankdata  # not at the top: slow to import

    return pearson(rankdata(left, axis=1), rankdata(right, axis=1))


def top_rank_correlation(one: Floats, other: Floats, count: int) -> float:
    """Compute Spearman's rank correlation of two predictions, over the tokens that lead in either.

    Args:
        one: Logits of a prediction, [token].
        other: Logits of another one.
        count: Number of the largest logits of each. Ties at the end prefer the first tokens.

    Returns:
        The correlation over the union of both sets, from -1 to 1. NaN if all their logits are equal
        in one prediction.
    """
    leaders = [np.argsort(-each, kind="stable")[:count] for each in (one, other)]
    union = np.union1d(*leaders)
    return float(spearman(one[None, union], other[None, union])[0])


def auroc(values: Floats, true: Floats | Bools) -> Floats:
    """Return how often a positive item has the greater value, with ties as half.

    It is Mann and Whitney's U divided by the number of pairs.

    Args:
        values: Shape [row, item].
        true: 0 or 1, shape [item].

    Returns:
        Shape [row].
    """
    from scipy.stats import rankdata  # not at the top: slow to import

    held = true > 0
    count, others = int(held.sum()), int((~held).sum())
    ranks = rankdata(values, axis=1)[:, held].sum(1)
    return (ranks - count * (count + 1) / 2) / (count * others)
