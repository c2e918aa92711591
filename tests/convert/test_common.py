"""Downloads that are not whole, or not as they should be."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nnunet_lomix.cli import main

from .downloads import draw_picture, refuse, replace, write_picture, write_volume


def remove(file: Path) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink()


def cut(file: Path) -> None:
    replace(file, file.read_bytes()[:-9])


def by(content: bytes):
    return lambda file: replace(file, content)


def by_volume(array, **placement):
    return lambda file: (file.unlink(), write_volume(file, array, **placement))


def by_picture(file: Path) -> None:
    file.unlink()
    write_picture(file, draw_picture("a", (9, 9))[1])


LABEL, IMAGE = ("RawData/Training/" + name for name in ("label/label0031.nii.gz", "img/img0031.nii.gz"))
TRAINING = "database/training"
GT, INFO = (f"{TRAINING}/patient050/{name}" for name in ("patient050_frame01_gt.nii.gz", "Info.cfg"))
GOOD = np.zeros((4, 8, 8), np.uint8)
SPOILED = [
    ("synapse", LABEL, remove, "Training lacks label/label0031.nii.gz: the download is not whole"),
    ("synapse", "RawData/Training/img", remove, "img/img0005.nii.gz and 25 more"),
    ("synapse", "RawData/Training/label", remove, "has no folders img and label"),
    ("synapse", "RawData/Training", remove, "has no folders img and label"),
    ("synapse", IMAGE, by(b""), "lacks img/img0031.nii.gz"),
    ("synapse", IMAGE, by(b"<html>"), "img0031.nii.gz can't be read, so repeat"),
    ("synapse", IMAGE, cut, "img0031.nii.gz is damaged, so repeat the download"),
    ("synapse", LABEL, by_volume(GOOD[1:]), "differs from its image in size (8 × 8 × 3 and 8 × 8 × 4 voxels)"),
    (
        *("synapse", LABEL, by_volume(GOOD, spacing=(1, 1, 5))),
        "label0031.nii.gz differs from its image in spacing (1 × 1 × 5 and 1.5 × 1.5 × 5 mm)",
    ),
    ("synapse", LABEL, by_volume(GOOD + 14), "label0031.nii.gz has values other than 0 to 13 (14 to 14)"),
    ("synapse", LABEL, by_volume(GOOD.astype(np.int16) - 1), "other than 0 to 13 (-1 to -1)"),
    ("synapse", LABEL, by_volume(GOOD + np.float32(0.5)), "other than 0 to 13 (0.5 to 0.5)"),
    ("acdc", f"{TRAINING}/patient007", remove, "training lacks patient007/Info.cfg"),
    ("acdc", GT, remove, "lacks patient050/patient050_frame01_gt.nii.gz"),
    ("acdc", TRAINING, remove, "has no folders patient001 to patient100"),
    ("acdc", GT, by_volume(GOOD + 4), "patient050_frame01_gt.nii.gz has values other than 0 to 3"),
    ("acdc", INFO, by(b"ED: one\nES: 9\n"), "Info.cfg doesn't say which frames are ED"),
    ("acdc", INFO, by(b"ED: 1\nES: 29\n"), "lacks patient050/patient050_frame29.nii.gz"),
    ("polyp", "CVC-ClinicDB/Original/9.tif", remove, "Original lacks 9"),
    ("polyp", "CVC-ClinicDB/Ground Truth/9.tif", remove, "Ground Truth lacks 9"),
    (
        "polyp",
        "CVC-ClinicDB/*/9.tif",
        remove,
        "has 611 pictures, and no known collection has so many (CVC-ClinicDB 612, ",
    ),
    ("polyp", "CVC-ClinicDB/Ground Truth", remove, "has no folders of images and masks"),
    ("polyp", "CVC-ClinicDB/Ground Truth/77.tif", by_picture, "has 9 × 9 pixels, but its image 16 × 12: repeat"),
]


@pytest.mark.parametrize("kind, files, spoil, text", SPOILED, ids=[text for *_, text in SPOILED])
def test_what_is_missing_or_not_as_it_should_be_is_named(own, nnunet, kind, files, spoil, text):
    source = own(kind)
    for file in list(source.glob(files)):
        spoil(file)
    refuse(kind, source, nnunet, text)


@pytest.mark.parametrize("kind", ["synapse", "acdc", "polyp"])
def test_archives(tmp_path, nnunet, kind):
    archive = tmp_path / "download" / "RawData.ZIP"
    archive.parent.mkdir()
    archive.write_bytes(b"PK")
    refuse(kind, archive, nnunet, "RawData.ZIP is not a folder: unpack the download")
    refuse(kind, archive.parent, nnunet, "unpack RawData.ZIP first.")


def test_labels_that_lie_elsewhere_by_their_header(own, nnunet):
    """nnU-Net trains on them with a warning, so they are no reason to refuse real data."""
    source = own("synapse")
    by_volume(GOOD, origin=(0, 0, 0))(source / LABEL)
    result = CliRunner().invoke(main, ["convert", "synapse", str(source)])
    told = "By their headers these labels lie elsewhere than their images, which nnU-Net ignores: label0031.nii.gz.\n"
    assert result.exit_code == 0 and told in result.stdout
