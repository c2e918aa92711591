"""The metrics of a pair of masks: each is one entry of :data:`METRICS`, and a new one needs nothing else.

Tools define the boundary metrics differently, so each entry says what is computed, and by which library. For empty
masks a metric has its best or worst value (Metrics Reloaded).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from nnunet_lomix.errors import UsageError


@dataclass(frozen=True)
class Metric:
    """A metric: a share, of which more is better, or a distance, of which less is.

    Attributes:
        name: as in tables and files.
        compute: its value for the reference's mask, the prediction's mask (boolean, of one shape, 2D or 3D, neither
            empty; outside of the arrays there is nothing), the spacing (mm for each axis), and the tolerance (mm).
        sentence: what is computed; ``{tolerance}`` stands for the tolerance with its unit.
        is_distance: whether values are in mm, or in pixels, without a largest one; shares go from 0 to 1, and are shown
            as points from 0 to 100.
        usual: whether it is computed unless others are asked for.
    """

    name: str
    compute: Callable[[np.ndarray, np.ndarray, Sequence[float], float], float]
    sentence: str
    is_distance: bool = False
    usual: bool = True

    @property
    def lower_is_better(self) -> bool:
        return self.is_distance

    @property
    def factor(self) -> float:
        """From the value to the unit that is shown."""
        return 1 if self.is_distance else 100

    def measure(
        self,
        expected: np.ndarray,
        predicted: np.ndarray,
        spacing: Sequence[float],
        tolerance: float,
        diagonal: float,
    ) -> float:
        """The value for any two masks: the best one if both are empty, the worst one if one of them is.

        The arguments are those of ``compute``, and the diagonal of the image in mm, the worst distance.
        """
        found = expected.any(), predicted.any()
        if all(found):
            return self.compute(expected, predicted, spacing, tolerance)
        if any(found):
            return diagonal if self.is_distance else 0
        return 0 if self.is_distance else 1


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
    Metric("Dice", _dice, "Dice is nnU-Net's: twice what two masks share, divided by the sum of both."),
    Metric(
        "NSD",
        _nsd,
        # marching cubes, and lengths in 2D: thick slices get their right weight, as in DeepMind's surface-distance
        "NSD is the share of both surfaces, weighted by area, that is within {tolerance} of the other one; surfaces "
        f"run between voxels ({_MONAI}).",
    ),
    Metric(
        "HD95",
        _hd95,
        "HD95 is the larger one of the two 95th percentiles of the distances from boundary voxels, which have a face "
        f"to the outside, to the nearest one of the other mask ({_MONAI}).",
        is_distance=True,
    ),
    # in each case a function of Dice, but their means over cases differ; papers on polyps give it
    Metric("IoU", _iou, "IoU, Jaccard's index, is nnU-Net's: what two masks share, divided by their union."),
    Metric(
        "clDice",
        _cl_dice,
        "clDice is for vessels: the harmonic mean of the share of the prediction's centre lines that lies in the "
        "reference and of the share of the reference's that lies in the prediction (Shit et al., CVPR 2021; centre "
        f"lines by scikit-image {version('scikit-image')}, for which voxels are cubes).",
        usual=False,
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
