"""The metrics of a pair of masks: each is one entry of :data:`METRICS`, and a new one needs nothing else.

Tools define the boundary metrics differently, so each entry says what is computed, and by which library. For empty
masks a metric has its best or worst value (Metrics Reloaded).
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from nnunet_lomix.errors import UsageError


@dataclass(frozen=True)
class Metric:
    """A metric, and how it is shown to people; by default it is a share, of which more is better.

    Attributes:
        name: as in tables and files.
        compute: its value for the reference's mask, the prediction's mask (boolean, of one shape, 2D or 3D, neither
            empty; outside of the arrays there is nothing), the spacing (mm for each axis), and the tolerance (mm).
        sentence: what is computed; ``{tolerance}`` stands for the tolerance with its unit.
        is_share: whether values go from 0 to 1, shown as points from 0 to 100; other metrics are distances, without a
            largest value, in mm or in pixels.
        lower_is_better: whether a lower value is the better one.
        both_empty: the value if both masks are empty.
        one_empty: the value if exactly one is; None: the diagonal of the image, in mm.
        usual: whether it is computed unless others are asked for.
    """

    name: str
    compute: Callable[[np.ndarray, np.ndarray, Sequence[float], float], float]
    sentence: str
    is_share: bool = True
    lower_is_better: bool = False
    both_empty: float = 1
    one_empty: float | None = 0
    usual: bool = False

    @property
    def factor(self) -> float:
        """From the value to the unit that is shown."""
        return 100 if self.is_share else 1

    @property
    def largest(self) -> float:
        """The largest value; the smallest is 0."""
        return 1 if self.is_share else math.inf

    def unit(self, distance: str) -> str:
        """The unit that is shown; ``distance`` is that of distances, ``mm`` or ``pixels``."""
        return "points" if self.is_share else distance

    def measure(
        self,
        expected: np.ndarray,
        predicted: np.ndarray,
        spacing: Sequence[float],
        tolerance: float,
        diagonal: float,
    ) -> float:
        """The value for any two masks.

        Args:
            expected, predicted: boolean, of one shape, 2D or 3D.
            spacing: mm for each axis.
            tolerance: mm.
            diagonal: of the image, in mm.
        """
        found = expected.any(), predicted.any()
        if all(found):
            return self.compute(expected, predicted, spacing, tolerance)
        if any(found):
            return diagonal if self.one_empty is None else self.one_empty
        return self.both_empty


def _dice(expected: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], tolerance: float) -> float:
    return float(2 * (expected & predicted).sum() / (expected.sum() + predicted.sum()))


def _iou(expected: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], tolerance: float) -> float:
    return float((expected & predicted).sum() / (expected | predicted).sum())


def _nsd(expected: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], tolerance: float) -> float:
    # importing it takes seconds, for which a call with known scores, or one that refuses, need not wait
    from monai.metrics.surface_dice import compute_surface_dice

    return _call_monai(
        compute_surface_dice, expected, predicted, spacing, class_thresholds=[tolerance], use_subvoxels=True
    )


def _hd95(expected: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], tolerance: float) -> float:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    return _call_monai(compute_hausdorff_distance, expected, predicted, spacing, percentile=95)


def _call_monai(
    function: Callable[..., Any], expected: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], **options: Any
) -> float:
    import torch

    masks = (torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (predicted, expected))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of MONAI to itself
        return float(function(*masks, include_background=True, spacing=list(spacing), **options))


def _cl_dice(expected: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], tolerance: float) -> float:
    precision = float(expected[_skeletonize(predicted)].mean())
    sensitivity = float(predicted[_skeletonize(expected)].mean())
    return 2 * precision * sensitivity / (precision + sensitivity) if precision + sensitivity else 0.0


def _skeletonize(mask: np.ndarray) -> np.ndarray:
    """Centre lines; every connected piece of the mask has one.

    In 3D scikit-image erases some pieces of even width altogether, as one of 2 × 2 × 20 voxels: they stay whole.
    """
    from scipy.ndimage import label
    from skimage.morphology import skeletonize

    skeleton = np.asarray(skeletonize(mask), bool)
    pieces, _ = label(mask, np.ones((3,) * mask.ndim))
    return skeleton | np.isin(pieces, np.setdiff1d(pieces[mask], pieces[skeleton]))


_MONAI = f"MONAI {version('monai')}"

_ENTRIES = (
    Metric("Dice", _dice, "Dice is nnU-Net's: twice what two masks share, divided by the sum of both.", usual=True),
    Metric(
        "NSD",
        _nsd,
        # marching cubes, and lengths in 2D: thick slices get their right weight, as in DeepMind's surface-distance
        "NSD is the share of both surfaces, weighted by area, that is within {tolerance} of the other one; surfaces "
        f"run between voxels ({_MONAI}).",
        usual=True,
    ),
    Metric(
        "HD95",
        _hd95,
        "HD95 is the larger one of the two 95th percentiles of the distances from boundary voxels, which have a face "
        f"to the outside, to the nearest one of the other mask ({_MONAI}).",
        is_share=False,
        lower_is_better=True,
        both_empty=0,
        one_empty=None,
        usual=True,
    ),
    # in each case a function of Dice, but their means over cases differ; papers on polyps give it
    Metric(
        "IoU", _iou, "IoU, Jaccard's index, is nnU-Net's: what two masks share, divided by their union.", usual=True
    ),
    Metric(
        "clDice",
        _cl_dice,
        "clDice is for vessels: the harmonic mean of the share of the prediction's centre lines that lies in the "
        "reference and of the share of the reference's that lies in the prediction (Shit et al., CVPR 2021; centre "
        f"lines by scikit-image {version('scikit-image')}, for which voxels are cubes).",
    ),
)
METRICS = {metric.name: metric for metric in _ENTRIES}
USUAL = tuple(name for name, metric in METRICS.items() if metric.usual)


def choose_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """The metrics of these names; those that are usual if there are none.

    Raises:
        UsageError: there is no such metric.
    """
    for name in names:
        if name not in METRICS:
            raise UsageError(f"There is no metric {name!r}: choose from {', '.join(METRICS)}.")
    return tuple(dict.fromkeys(names)) or USUAL
