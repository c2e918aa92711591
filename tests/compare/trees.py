"""Trees of files like those that nnU-Net leaves."""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

DATASET = "Dataset009_Toy"
CLASSES = {"labels": {"background": 0, "liver": 1, "tumour": 2}, "file_ending": ".nii.gz"}
REGIONS = {
    "labels": {"background": 0, "all": [1, 2], "tumour": 2, "ignore": 3},
    "regions_class_order": [1, 2],
    "file_ending": ".nii.gz",
}
FOLDS = {"0": ("a", "b"), "1": ("c",)}


def write(path: Path, seed: int, shape=(4, 6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.random.default_rng(seed).integers(0, 3, shape).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(labels), path)


MEAN_CLASS = CLASSES | {"labels": {"background": 0, "mean": 1, "tumour": 2}}


class Trees:
    """nnU-Net's folders with predictions of folds 0 and 1, and what tests break in them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.references = folder / "preprocessed" / DATASET / "gt_segmentations"
        for i, case in enumerate(case for cases in FOLDS.values() for case in cases):
            write(self.references / f"{case}.nii.gz", i)

    def model(self, trainer: str, results="results") -> Path:
        return self.folder / results / DATASET / f"{trainer}__nnUNetPlans__2d"

    def add(self, trainer: str, seed: int = 1, results="results", description=CLASSES, reader="SimpleITKIO", **planned):
        model = self.model(trainer, results)
        for fold, cases in FOLDS.items():
            for i, case in enumerate(cases):
                write(model / f"fold_{fold}" / "validation" / f"{case}.nii.gz", 100 * seed + i)
        (model / "dataset.json").write_text(json.dumps(description))
        plans = {
            "image_reader_writer": reader,
            "configurations": {"2d": {"spacing": [1.0, 1.0], "architecture": {}} | planned},
            "dataset_name": DATASET,
            "plans_name": "nnUNetPlans",
            "label_manager": "LabelManager",
        }
        (model / "plans.json").write_text(json.dumps(plans))
