"""HD95 and NSD by brute force, over sets of boundary voxels and of boundary elements."""

from functools import cache
from itertools import product

import numpy as np
from skimage.measure import marching_cubes, mesh_surface_area


def brute_hd95(a: np.ndarray, b: np.ndarray, spacing) -> float:
    points = [np.argwhere(boundary_voxels(mask)) * spacing for mask in (a, b)]
    distances = pairwise(*points)
    return max(np.percentile(distances.min(axis=axis), 95) for axis in (0, 1))


def boundary_voxels(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    inside = np.ones_like(mask)
    for axis, shift in product(range(mask.ndim), (-1, 1)):
        inside &= np.roll(padded, shift, axis)[(slice(1, -1),) * mask.ndim]
    return mask & ~inside


def brute_nsd(a: np.ndarray, b: np.ndarray, spacing, tolerance: float) -> float:
    (points_a, areas_a), (points_b, areas_b) = (boundary_elements(mask, spacing) for mask in (a, b))
    distances = pairwise(points_a, points_b)
    near = areas_a[distances.min(axis=1) <= tolerance].sum() + areas_b[distances.min(axis=0) <= tolerance].sum()
    return near / (areas_a.sum() + areas_b.sum())


def boundary_elements(mask: np.ndarray, spacing) -> tuple[np.ndarray, np.ndarray]:
    """Every corner between voxels of which some are in the mask and some aren't, and the area of boundary there."""
    padded = np.pad(mask, 1)
    points, areas = [], []
    for corner in np.ndindex(*(n + 1 for n in mask.shape)):
        cell = padded[tuple(slice(i, i + 2) for i in corner)]
        if cell.any() and not cell.all():
            points.append(np.multiply(corner, spacing))
            areas.append(area(cell.tobytes(), tuple(spacing)))
    return np.array(points), np.array(areas)


@cache
def area(cell: bytes, spacing: tuple[float, ...]) -> float:
    cell = np.frombuffer(cell, dtype=bool).reshape((2,) * len(spacing))
    if len(spacing) == 3:
        # where voxels of a mask touch by an edge or a corner only, the mask or its complement can be taken as connected
        meshes = (marching_cubes(v.astype(float), 0.5, spacing=spacing, method="lorensen") for v in (cell, ~cell))
        return min(mesh_surface_area(*mesh[:2]) for mesh in meshes)
    corner_cut = np.hypot(*spacing) / 2
    if cell.sum() != 2:
        return corner_cut
    if cell[0, 0] == cell[1, 1]:
        return 2 * corner_cut
    return spacing[1] if cell[0, 0] == cell[0, 1] else spacing[0]


def pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a[:, None] - b[None], axis=-1)
