"""Where voxels are, and whether they are those of a reference."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lomix.errors import LoMixError

# Of the smallest spacing: that voxels lie further apart than this is no rounding of a header. Those who take a voxel's
# corner for its centre are half a voxel off.
TOLERATED_SHIFT = 0.25
# Spacings are rounded, too, in a JSON file for one; what that adds up to over an image is compared by positions.
TOLERATED_SPACING = 1e-3


@dataclass(frozen=True)
class Grid:
    """Where the voxels are, along the axes of the array.

    Attributes:
        shape: their number along each axis.
        spacing: mm of a voxel along each axis.
        origin: position of the first voxel, in mm to the patient's left, to the back and upwards; () if nnU-Net's
            reader keeps none.
        steps: for each axis the way from a voxel to the next one, as ``origin``; () if the reader keeps none.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] = ()
    steps: tuple[tuple[float, ...], ...] = ()

    @property
    def corners(self) -> np.ndarray:
        """Positions of the outermost voxels, as ``origin``, one a row; only where the reader keeps positions."""
        ends = list(product(*((0, length - 1) for length in self.shape)))
        return np.array(self.origin) + np.array(ends) @ np.array(self.steps)


def make_grid(shape: tuple[int, ...], spacing: Sequence[float], properties: Mapping[str, Any]) -> Grid:
    """From what nnU-Net's readers give and keep for their own writing.

    Args:
        shape: of the array; if it has fewer axes than the file, these are the last ones.
        spacing: of all axes of the file.
        properties: as the reader gives them.
    """
    axes = len(shape)
    origin, steps = _locate(properties)
    return Grid(shape, tuple(map(float, spacing[-axes:])), origin, steps[-axes:])


def _locate(properties: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """Origin, and the steps of all axes of the file."""
    if "nibabel_stuff" in properties:
        kept = properties["nibabel_stuff"]
        # nibabel's positions are to the right and to the front
        affine = np.diag([-1, -1, 1, 1]) @ kept.get("reoriented_affine", kept["original_affine"])
        origin, columns = affine[:3, 3], affine[:3, :3]
    elif "sitk_stuff" in properties:
        kept = properties["sitk_stuff"]
        origin = np.array(kept["origin"])
        columns = np.reshape(kept["direction"], (len(origin), len(origin))) * kept["spacing"]
    else:
        return (), ()
    # a column for each axis, x, y, z and maybe channels, which the array has in the opposite order
    return tuple(map(float, origin[:3])), tuple(tuple(map(float, step[:3])) for step in columns.T[::-1])


def require_same_grid(file: Path, own: Grid, reference: Grid, placed: bool = True) -> None:
    """Refuse a prediction whose voxels aren't those of its reference.

    Args:
        file: of the prediction, for the message.
        own, reference: where their voxels are.
        placed: whether they must lie at the same positions, too.

    Raises:
        LoMixError: shape, spacing or, with ``placed``, positions differ.
    """
    alike = own.shape == reference.shape
    if not alike or not np.allclose(own.spacing, reference.spacing, rtol=TOLERATED_SPACING, atol=0):
        what = "spacing" if alike else "shape"
        found, expected = (" × ".join(f"{n:g}" for n in getattr(grid, what)) for grid in (own, reference))
        raise LoMixError(f"{file} has the {what} {found}, but its reference {expected}: resample it.")
    distance = _measure_distance(own, reference) if placed else 0
    if distance > TOLERATED_SHIFT * min(reference.spacing):
        raise LoMixError(
            f"{file} has another origin or direction than its reference, so its voxels are elsewhere, up to "
            f"{distance:.2g} mm away: resample it."
        )


def _measure_distance(own: Grid, reference: Grid) -> float:
    """How far the voxels of two grids of one shape lie apart at most, in mm; 0 if they have no positions."""
    if len(own.origin) != len(reference.origin):
        return math.inf
    if not own.origin:
        return 0.0
    # positions are linear in the indices, so that nothing is further away than a corner
    return float(np.linalg.norm(own.corners - reference.corners, axis=1).max())
