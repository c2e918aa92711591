"""Dice, normalised surface Dice, HD95 and IoU of a pair of masks.

The boundary metrics are MONAI's. Tools define them differently, so here is what is computed:

- NSD: the share of both boundaries that is within the tolerance of the other one. Boundaries run between voxels, and
  each of their elements counts with its area in mm² (marching cubes; in 2D its length), so that thick slices get their
  right weight (``monai.metrics.compute_surface_dice`` with ``use_subvoxels``; the definition of DeepMind's
  ``surface-distance``).
- HD95: the larger one of the two 95th percentiles of the distances from boundary voxels to the nearest boundary voxel
  of the other mask, in mm (``monai.metrics.compute_hausdorff_distance``). A boundary voxel has a face to the outside.

Dice and IoU (Jaccard's index: what the masks share, divided by their union) are nnU-Net's. For empty masks a metric has
its best or worst value (Metrics Reloaded): if both are empty, Dice, NSD and IoU 1 and HD95 0; if one is, Dice, NSD and
IoU 0 and HD95 the diagonal of the image.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

IMPLEMENTATION = (
    "Dice and IoU as nnU-Net's; NSD (surface weighted by area) and HD95 (between boundary voxels) by MONAI "
    f"{version('monai')}"
)


@dataclass(frozen=True)
class Metric:
    """How a metric is shown to people.

    Attributes:
        unit: that is shown; None: that of distances, mm or pixels, as the files have a scale or not.
        factor: from the value to this unit.
        largest: the largest value, in this unit; the smallest is 0.
        lower_is_better: whether a lower value is the better one.
    """

    unit: str | None
    factor: float
    largest: float
    lower_is_better: bool


# in the order of what `measure` returns
METRICS = {
    "Dice": Metric("points", 100, 100, lower_is_better=False),
    "NSD": Metric("points", 100, 100, lower_is_better=False),
    "HD95": Metric(None, 1, math.inf, lower_is_better=True),
    # in each case a function of Dice, but their means over cases differ; papers on polyps give it
    "IoU": Metric("points", 100, 100, lower_is_better=False),
}


def measure(
    expected: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], tolerance: float, diagonal: float
) -> list[float]:
    """Dice, NSD, HD95 and IoU of a pair of masks; outside of the arrays there is nothing.

    Args:
        expected, predicted: boolean, of one shape, 2D or 3D.
        spacing: mm for each axis.
        tolerance: of the NSD, in mm.
        diagonal: HD95 if exactly one mask is empty, in mm.
    """
    sizes = expected.sum(), predicted.sum()
    if not any(sizes):
        return [1.0, 1.0, 0.0, 1.0]
    if not all(sizes):
        return [0.0, 0.0, diagonal, 0.0]
    shared = (expected & predicted).sum()
    # seconds that a call with known scores, or one that refuses, need not wait
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice

    a, b = (torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (predicted, expected))
    options: dict[str, Any] = {"include_background": True, "spacing": list(spacing)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of MONAI to itself
        nsd = compute_surface_dice(a, b, [tolerance], use_subvoxels=True, **options)
        hd95 = compute_hausdorff_distance(a, b, percentile=95, **options)
    return [float(2 * shared / sum(sizes)), float(nsd), float(hd95), float(shared / (sum(sizes) - shared))]
