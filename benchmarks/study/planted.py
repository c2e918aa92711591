"""A data set in which it is known which scales matter: thin lines, which only the finest output can draw.

The lines are one pixel wide and the background is noise that is smooth over many pixels: at half resolution a line is
already wider than it is, at a quarter it's a smear. So the maps with ``z_0`` deserve the weight, and those of coarse
scales alone deserve none.
"""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunet_lomix.nnunet.results import DATASET_JSON

CASES = 48
SHAPE = (4, 64, 64)
LINES = 4


def write_planted(folder: Path) -> None:
    """Write the data set in nnU-Net's raw format."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for seed in range(CASES):
        image, labels = make_case(seed)
        sitk.WriteImage(sitk.GetImageFromArray(image), folder / "imagesTr" / f"case_{seed:03}_0000.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(labels), folder / "labelsTr" / f"case_{seed:03}.nii.gz")
    description = {
        "channel_names": {"0": "synthetic"},
        "labels": {"background": 0, "line": 1},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    (folder / DATASET_JSON).write_text(json.dumps(description))


def make_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
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
