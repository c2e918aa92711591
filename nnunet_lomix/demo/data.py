"""A small data set with structures at several scales, for a segmentation that is learned in minutes.

A body with a large organ, a small one, lesions in the large organ and a tree of thin vessels; smooth random
shapes, partial volume, a multiplicative bias field and noise. The same code makes 2D and 3D images, seeded.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.random import Generator
from scipy.ndimage import distance_transform_edt, gaussian_filter

from nnunet_lomix.files import building
from nnunet_lomix.nnunet.datasets import Split, name_image, write_splits
from nnunet_lomix.nnunet.results import DATASET_JSON

ENDING = ".nii.gz"
LABELS = {"background": 0, "large organ": 1, "small organ": 2, "lesion": 3, "vessels": 4}
OUTSIDE = 0.1
INTENSITIES = {"body": 0.45, "large organ": 0.65, "small organ": 0.2, "lesion": 0.3, "vessels": 0.95}
NOISE = 0.08
Tip = tuple[np.ndarray, np.ndarray]  # of a vessel: its position, in voxels, and its direction
BIAS = 0.2  # standard deviation of the logarithm of the bias field


def write_dataset(
    folder: Path,
    shape: Sequence[int],
    train_cases: int,
    test_cases: int,
    on_case: Callable[[int], None] = lambda done: None,
) -> None:
    """Write a data set in nnU-Net's raw format, ``labelsTs`` included. The folder appears once complete.

    Args:
        folder: the folder to make, named as nnU-Net wants it.
        shape: size of the images, 2D or 3D.
        train_cases, test_cases: number of cases for training and held out.
        on_case: called after each case with the number of those that are written.
    """
    cases = [f"case_{seed:03}" for seed in range(train_cases + test_cases)]
    description = {
        "channel_names": {"0": "synthetic"},
        "labels": LABELS,
        "numTraining": train_cases,
        "file_ending": ENDING,
        "overwrite_image_reader_writer": "SimpleITKIO",
    }
    with building(folder) as temporary:
        for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (temporary / part).mkdir()
        for seed, case in enumerate(cases):
            image, labels = make_case(shape, seed)
            part = "Tr" if seed < train_cases else "Ts"
            _write(image, temporary / f"images{part}" / name_image(case, 0, ENDING))
            _write(labels, temporary / f"labels{part}" / f"{case}{ENDING}")
            on_case(seed + 1)
        (temporary / DATASET_JSON).write_text(json.dumps(description, indent=4))
        # made here, as trainings that start side by side would make it at once, and read it half written
        validated = train_cases // 5
        write_splits(temporary, [Split(train=cases[validated:train_cases], val=cases[:validated])])


def make_case(shape: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One image and its labels, both of ``shape``; float32 and uint8. Every class is there.

    >>> image, labels = make_case((64, 64), seed=0)
    >>> np.unique(labels).tolist()
    [0, 1, 2, 3, 4]
    """
    rng = np.random.default_rng(seed)
    # each axis runs from -1 to 1
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    structures = _structures(rng, grid)
    image = np.full(shape, OUTSIDE)
    labels = np.zeros(shape, np.uint8)
    for name, mask in structures.items():
        image[mask] = INTENSITIES[name] + 0.02 * rng.standard_normal()
        labels[mask] = LABELS.get(name, 0)
    image = gaussian_filter(image, 0.5)  # partial volume
    image *= np.exp(BIAS * _smooth_field(rng, shape, 0.3))
    image += NOISE * rng.standard_normal(shape)
    return image.astype(np.float32), labels


def _structures(rng: Generator, grid: np.ndarray) -> dict[str, np.ndarray]:
    """The mask of each structure; a later one lies over an earlier one."""
    # the last two axes are the plane of the anatomy; in 3D the first one starts at the middle of the body
    large_at = _place(rng, grid, (0.05, -0.33))
    small_at = _place(rng, grid, (-0.1, 0.5))
    lesions_at = [large_at + 0.25 * _direction(rng, len(grid)) for _ in range(rng.integers(1, 4))]
    body = _blob(rng, grid, np.zeros(len(grid)), 0.82, wobble=0.05)
    return {
        "body": body,
        "large organ": _blob(rng, grid, large_at, 0.42),
        "small organ": _blob(rng, grid, small_at, 0.2),
        "vessels": _vessels(rng, grid.shape[1:]) & body,
        "lesion": np.any([_blob(rng, grid, at, rng.uniform(0.1, 0.15)) for at in lesions_at], axis=0),
    }


def _place(rng: Generator, grid: np.ndarray, in_plane: tuple[float, float]) -> np.ndarray:
    return np.array([0, *in_plane])[-len(grid) :] + 0.05 * rng.standard_normal(len(grid))


def _direction(rng: Generator, dim: int) -> np.ndarray:
    vector = rng.standard_normal(dim)
    return vector / np.linalg.norm(vector)


def _smooth_field(rng: Generator, shape: Sequence[int], scale: float) -> np.ndarray:
    """Gaussian field of mean 0 and standard deviation 1, smooth over ``scale`` of the image."""
    field = gaussian_filter(rng.standard_normal(shape), scale * min(shape))
    return (field - field.mean()) / field.std()


def _blob(rng: Generator, grid: np.ndarray, centre: np.ndarray, radius: float, wobble: float = 0.12) -> np.ndarray:
    """An ellipsoid with an uneven surface."""
    dim = len(grid)
    column = (dim, *[1] * dim)
    radii = radius * rng.uniform(0.85, 1.15, dim)
    distance = np.linalg.norm((grid - centre.reshape(column)) / radii.reshape(column), axis=0)
    return distance + wobble * _smooth_field(rng, grid.shape[1:], 0.08) < 1


def _vessels(rng: Generator, shape: Sequence[int]) -> np.ndarray:
    """A tree from the lower rim of the body upwards: each branch ends in two thinner ones."""
    size = np.array(shape)
    dim = len(shape)
    tips = [(size * np.array([0.5, 0.85, 0.55])[-dim:], np.array([0, -1, 0.1])[-dim:])]
    tree = np.zeros(shape, bool)
    for radius in (1.5, 1.2, 1.0, 1.0):
        branches, tips = _grow(rng, tips, size)
        tree |= distance_transform_edt(~branches) <= radius
    return tree


def _grow(rng: Generator, tips: list[Tip], size: np.ndarray) -> tuple[np.ndarray, list[Tip]]:
    """The mask of branches that start at ``tips``, and the tips that they end in, two each."""
    branches = np.zeros(size, bool)
    ends: list[Tip] = []
    for position, direction in tips:
        for _ in range(int(rng.uniform(0.15, 0.25) * min(size) * 2)):
            # wanders, and turns back at the rim
            direction = direction + 0.1 * rng.standard_normal(len(size)) + 0.3 * (0.5 - position / size) ** 3
            direction /= np.linalg.norm(direction)
            position = np.clip(position + direction / 2, 0, size - 1)
            branches[tuple(position.astype(int))] = True
        side = 0.7 * _direction(rng, len(size))
        ends += [(position, direction + side), (position, direction - side)]
    return branches, ends


def _write(array: np.ndarray, path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path), useCompression=True)
