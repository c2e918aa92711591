"""Segmentations as files of the kinds that nnU-Net reads."""

import json
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

SPACING = (0.5, 3.0, 0.7)


def save(labels: np.ndarray, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(labels), file)
    return file


def save_nifti(labels: np.ndarray, file: Path, orientation="LPS", spacing=SPACING) -> Path:
    """Voxels (z, y, x) in LPS, with the origin (7, 8, 9), stored in an orientation."""
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    affine[:3, 3] = -7, -8, 9
    image = nibabel.Nifti1Image(labels.T, affine)
    stored = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(orientation)))
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(stored, file)
    return file


def save_tiff(labels: np.ndarray, file: Path, spacing=None) -> Path:
    """A 3D TIFF; nnU-Net looks for its spacing in a JSON file beside."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(file, labels)
    if spacing:
        file.with_suffix(".json").write_text(json.dumps({"spacing": spacing}))
    return file
