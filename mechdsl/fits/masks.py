"""How well maps over image patches agree with masks and with measured effects."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, Floats


def pixel_patches(size: tuple[int, int], grid: tuple[int, int]) -> NDArray[np.int64]:
    """[height, width] the number of the patch that each pixel lies in, counted row by row.

    size: (height, width) in pixels. grid: (rows, columns) of patches. A pixel belongs to the patch
    that its middle lies in. ValueError where there are more patches than pixels along a side.
    """
    (height, width), (rows, cols) = size, grid
    if rows > height or cols > width:
        raise ValueError(f"{rows} x {cols} patches of an image of {height} x {width} pixels")
    down = (2 * np.arange(height) + 1) * rows // (2 * height)
    across = (2 * np.arange(width) + 1) * cols // (2 * width)
    return down[:, None] * cols + across[None, :]


def mask_shares(mask: Bools, grid: tuple[int, int]) -> Floats:
    """[row, col] which share of each patch's pixels the mask has."""
    size = (mask.shape[0], mask.shape[1])
    number = pixel_patches(size, grid).ravel()
    count = grid[0] * grid[1]
    hit = np.bincount(number, weights=mask.ravel().astype(np.float64), minlength=count)
    return (hit / np.bincount(number, minlength=count)).reshape(grid)


def pointing_game(values: Floats, mask: Bools) -> float:
    """1 where the greatest number of a map lies in the mask, else 0: the pointing game (Zhang et
    al. 2018, Top-down neural attention by excitation backprop). A patch lies in it where at least
    half of its pixels do; of several that are the greatest, the share that does. NaN of a map
    without numbers.

    values: [row, col]. mask: [height, width].
    """
    there = np.isfinite(values)
    if not there.any():
        return float("nan")
    peak = there & (values == np.max(values[there]))
    inside = mask_shares(mask, (values.shape[0], values.shape[1])) >= 0.5
    return float(inside[peak].mean())


def relevance_mass(values: Floats, mask: Bools) -> float:
    """Which share of what is above 0 in a map lies in the mask: relevance mass accuracy (Arras et
    al. 2022, arXiv 2003.07258), the energy-based pointing game (Wang et al. 2020, Score-CAM). A
    patch that is partly in it counts by its share of pixels. NaN where nothing is above 0.

    values: [row, col]. mask: [height, width].
    """
    above = np.where(values > 0, values, 0.0)
    whole = float(above.sum())
    if whole == 0:
        return float("nan")
    return float((above * mask_shares(mask, (values.shape[0], values.shape[1]))).sum() / whole)


def iou(values: Floats, mask: Bools, share: float | None = None) -> float:
    """Intersection over union, in pixels, of the mask and the patches with the greatest numbers.

    values: [row, col]. mask: [height, width]. share: of all patches, how many of them are taken, at
    least one, rounded half up; None for the mask's own share of the image, so that size alone costs
    nothing. Where patches are equally great and not all are taken, each stands with that part of it
    that is. NaN of a map without numbers. ValueError for a share that isn't above 0 and at most 1.
    """
    there = np.isfinite(values)
    if not there.any():
        return float("nan")
    share = float(mask.mean()) if share is None else share
    if not 0 <= share <= 1 or (share == 0 and mask.any()):
        raise ValueError(f"a share of {share:g} patches")
    count = min(max(1, int(share * values.size + 0.5)), int(there.sum()))
    taken = _taken(values, there, count)
    size = (mask.shape[0], mask.shape[1])
    painted = taken.ravel()[pixel_patches(size, (values.shape[0], values.shape[1]))]
    both = float(painted[mask].sum())
    return both / float(painted.sum() + mask.sum() - both)


def _taken(values: Floats, there: Bools, count: int) -> Floats:
    """[row, col] 1 for each of `count` patches with the greatest numbers; what is left of them is
    shared by those that tie."""
    last = np.sort(values[there])[-count]
    above, tied = there & (values > last), there & (values == last)
    return above + tied * ((count - above.sum()) / tied.sum())


def area_under_curve(curve: Floats, at: Floats) -> Floats:
    """[…] the area under curves over the range of `at`, by trapezoids, divided by its width: their
    mean height, the AUC of insertion and deletion (Petsiuk et al. 2018, RISE).

    curve: […, step]. at: [step], ascending. ValueError below 2 steps or where `at` isn't ascending.
    """
    if len(at) < 2 or not (np.diff(at) > 0).all():
        raise ValueError("a curve needs two steps, in ascending order")
    return np.trapezoid(curve, at, axis=-1) / (at[-1] - at[0])


def infidelity(values: Floats, taken: Bools, drops: Floats) -> float:
    """How far a map is from what happens: the mean of (β Σ of the numbers of the patches that were
    taken out − what the output fell by)² (Yeh et al. 2019, definition 2.1). β, 0 or more, is what
    makes it least (their optimal scaling): a map has no scale of its own. NaN where a patch that
    was taken out has no number.

    values: [row, col]. taken: [draw, row, col]. drops: [draw] f(x) − f(x with these taken out).
    """
    expected = np.where(taken, values, 0.0).sum((1, 2))
    squared = float(expected @ expected)
    scale = max(0.0, float(expected @ drops) / squared) if squared > 0 else 0.0
    return float(np.mean((scale * expected - drops) ** 2))


def sensitivity(values: Floats, others: Floats) -> float:
    """How far a map moves at most where the image moves little: max ‖other − map‖ (the
    max-sensitivity of Yeh et al. 2019), here over ‖map‖, of the patches that have numbers in the
    map. NaN for a map of zeros, and where another lacks one of these.

    values: [row, col]. others: [draw, row, col], maps of images nearby.
    """
    there = np.isfinite(values)
    length = float(np.linalg.norm(values[there]))
    moved = np.linalg.norm((others - values)[:, there], axis=1)
    return float(moved.max()) / length if length > 0 else float("nan")
