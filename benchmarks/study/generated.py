"""Data sets that are generated, in which it is known what matters.

Planted: thin lines, which only the finest output can draw. They are one pixel wide and the background is noise that is
smooth over many pixels: at half resolution a line is already wider than it is, at a quarter it's a smear. So the maps
with ``z_0`` deserve the weight, and those of coarse scales alone deserve none.

Organs: eight of them, each at its place in the body, in four shades that pairs of them share. What tells a pair apart
is where it is, which coarse scales see; there are as many classes as in abdominal CT, and so many maps.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunet_lomix.nnunet.results import DATASET_JSON

PLANTED, ORGANS = "Dataset900_Planted", "Dataset901_Organs"
CASES = 48
SHAPE = (4, 64, 64)
LINES = 4
BODY = (6, 96, 96)
PLACES = [(0.3, 0.3), (0.3, 0.7), (0.7, 0.3), (0.7, 0.7), (0.5, 0.2), (0.5, 0.8), (0.25, 0.5), (0.75, 0.5)]


def write_datasets(folder: Path) -> list[Path]:
    """Write all that are missing in nnU-Net's raw format, each in a folder of its name; gives these."""
    labels = {PLANTED: ["line"], ORGANS: [f"organ_{i + 1}" for i in range(len(PLACES))]}
    for name, make_case in ((PLANTED, make_lines), (ORGANS, make_organs)):
        if not (folder / name).is_dir():
            write_dataset(folder / name, labels[name], make_case)
    return [folder / name for name in labels]


def write_dataset(folder: Path, labels: list[str], make_case: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> None:
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for seed in range(CASES):
        image, segmentation = make_case(seed)
        sitk.WriteImage(sitk.GetImageFromArray(image), folder / "imagesTr" / f"case_{seed:03}_0000.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(segmentation), folder / "labelsTr" / f"case_{seed:03}.nii.gz")
    description = {
        "channel_names": {"0": "synthetic"},
        "labels": {name: i for i, name in enumerate(["background", *labels])},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    (folder / DATASET_JSON).write_text(json.dumps(description))


def make_lines(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels of shape SHAPE; every slice has its own lines."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(SHAPE, np.uint8)
    rows, columns = np.indices(SHAPE[1:])
    for plane in labels:
        for _ in range(LINES):
            angle = rng.uniform(0, np.pi)
            distance = (rows - rng.uniform(8, 56)) * np.cos(angle) + (columns - rng.uniform(8, 56)) * np.sin(angle)
            plane[np.abs(distance) < 0.5] = 1
    clutter = 3 * gaussian_filter(rng.normal(size=SHAPE), (0, 4, 4)) / 0.1
    return (labels * 1.0 + 0.3 * clutter + rng.normal(0, 0.35, SHAPE)).astype(np.float32), labels


def make_organs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels of shape BODY; the places, sizes and shades of organs vary, and one in ten is missing."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(BODY, np.uint8)
    grid = np.indices(BODY)
    for i, place in enumerate(PLACES):
        centre = rng.normal([0.5, *place], [0.1, 0.04, 0.04]) * BODY
        radii = rng.uniform([2, 5, 5], [4, 13, 13])
        inside = sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, radii, strict=True)) < 1
        if rng.uniform() > 0.1:
            labels[inside] = i + 1
    shades = np.append(0, 1 + np.arange(len(PLACES)) % 4) + rng.normal(0, 0.2, len(PLACES) + 1)
    clutter = 3 * gaussian_filter(rng.normal(size=BODY), (0, 6, 6)) / 0.1
    return (shades[labels] + 0.4 * clutter + rng.normal(0, 0.8, BODY)).astype(np.float32), labels
