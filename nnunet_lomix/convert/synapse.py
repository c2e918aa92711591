"""Synapse: 30 CT scans of the abdomen of MICCAI 2015's challenge "Beyond the Cranial Vault" (BTCV), 8 of 13 organs.

The download is ``RawData.zip`` of synapse.org, syn3193805: ``RawData/Training/img/img0001.nii.gz`` and
``RawData/Training/label/label0001.nii.gz``, numbers 1 to 10 and 21 to 40. 18 scans are for training and 12 for tests,
by the list of TransUNet (Chen et al., arXiv 2102.04306), which LoMix and those before it use.
"""

from pathlib import Path

from nnunet_lomix.convert.common import (
    Case,
    Download,
    check_grids,
    copy_volume,
    find_folder,
    find_volume,
    relabel,
    require_files,
)

SCANS = (*range(1, 11), *range(21, 41))
TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
# by value in the download; None becomes background
ORGANS = (
    "background",
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    None,  # oesophagus
    "liver",
    "stomach",
    "aorta",
    *(None, None),  # inferior vena cava, portal and splenic vein
    "pancreas",
    *(None, None),  # adrenal glands
)
# in the order of TransUNet's tables
CLASSES = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")


def find(source: Path) -> Download:
    """The download in a folder: that with ``RawData``, or ``RawData`` or ``Training`` itself.

    Intensities stay as they are: nnU-Net normalises CT by percentiles that it takes from the training cases, in place
    of TransUNet's −125 to 275 HU.

    Raises:
        LoMixError: it isn't there or not whole.
    """
    folder = find_folder(source, "label", "folders img and label")
    cases = {
        f"case{scan:04}": Case(find_volume(folder / f"img/img{scan:04}"), find_volume(folder / f"label/label{scan:04}"))
        for scan in SCANS
    }
    require_files(folder, (file for case in cases.values() for file in case))
    test = [f"case{scan:04}" for scan in TEST]
    return Download(
        name="Synapse",
        number=601,
        channels=["CT"],
        classes=CLASSES,
        ending=".nii.gz",
        cases=cases,
        train=[case for case in cases if case not in test],
        test=test,
        val=[],
        write_image=copy_volume,
        write_labels=relabel([CLASSES.index(organ) + 1 if organ in CLASSES else 0 for organ in ORGANS]),
        notes=check_grids(cases.values()),
    )
