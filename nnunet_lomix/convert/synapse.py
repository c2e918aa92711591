"""Synapse: 30 CT scans of the abdomen of MICCAI 2015's challenge "Beyond the Cranial Vault" (BTCV), 8 of 13 organs.

The download is ``RawData.zip`` of synapse.org, syn3193805: ``RawData/Training/img/img0001.nii.gz`` and
``RawData/Training/label/label0001.nii.gz``, numbers 1 to 10 and 21 to 40. 18 scans are for training and 12 for tests,
by the list of TransUNet (Chen et al., arXiv 2102.04306), which LoMix and those before it use.
"""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_lomix.convert.common import (
    Case,
    Download,
    check_grids,
    copy_volume,
    find_folder,
    read_labels,
    require_files,
)

SCANS = (*range(1, 11), *range(21, 41))
TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
# value in the download, in the order of TransUNet's tables; 5, 9, 10, 12 and 13 (oesophagus, vena cava, portal and
# splenic vein, adrenal glands) become background
ORGANS = {
    "aorta": 8,
    "gallbladder": 4,
    "left kidney": 3,
    "right kidney": 2,
    "liver": 6,
    "pancreas": 11,
    "spleen": 1,
    "stomach": 7,
}
HIGHEST = 13
PLACES = ("", "Training", "RawData/Training", "RawData", "Abdomen/RawData/Training", "Abdomen")


def find(source: Path) -> Download:
    """The download in a folder: that with ``RawData``, or ``RawData`` or ``Training`` itself.

    Intensities stay as they are: nnU-Net normalises CT by percentiles that it takes from the training cases, in place
    of TransUNet's −125 to 275 HU.

    Raises:
        LoMixError: it isn't there or not whole.
    """
    folder = find_folder(
        source, PLACES, lambda place: any((place / part).is_dir() for part in ("img", "label")), "folders img and label"
    )
    cases = {
        f"case{scan:04}": Case(folder / f"img/img{scan:04}.nii.gz", folder / f"label/label{scan:04}.nii.gz")
        for scan in SCANS
    }
    require_files(folder, (file for case in cases.values() for file in case))
    test = [f"case{scan:04}" for scan in TEST]
    return Download(
        name="Synapse",
        number=601,
        channels=["CT"],
        classes=list(ORGANS),
        ending=".nii.gz",
        cases=cases,
        train=[case for case in cases if case not in test],
        test=test,
        val=[],
        write_image=copy_volume,
        write_labels=write_labels,
        notes=check_grids(list(cases.values())),
    )


def write_labels(source: Path, target: Path) -> None:
    """Write the 8 organs of a label file of 13, as values 1 to 8.

    Raises:
        LoMixError: the file can't be read, or has other values.
    """
    image, values = read_labels(source, HIGHEST)
    table = np.zeros(HIGHEST + 1, np.uint8)
    for new, old in enumerate(ORGANS.values(), 1):
        table[old] = new
    organs = sitk.GetImageFromArray(table[values])
    organs.CopyInformation(image)
    sitk.WriteImage(organs, str(target), useCompression=True)
