"""Downloads that are not whole, or not as they should be."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nnunet_lomix.cli import main

from .downloads import draw_picture, refuse, replace, write_picture, write_volume


@pytest.mark.parametrize(
    "kind, missing, texts",
    [
        (
            "synapse",
            ["RawData/Training/label/label0040.nii.gz"],
            ["Training lacks label/label0040.nii.gz: the download"],
        ),
        ("synapse", ["RawData/Training/img"], ["lacks img/img0001.nii.gz, ", "and 25 more"]),
        ("synapse", ["RawData/Training/label"], ["has no folders img and label"]),
        ("synapse", ["RawData/Training"], ["has no folders img and label"]),
        ("acdc", ["database/training/patient007"], ["training lacks patient007/Info.cfg"]),
        (
            "acdc",
            ["database/training/patient100/patient100_frame01_gt.nii.gz"],
            ["lacks patient100/patient100_frame01_gt.nii.gz"],
        ),
        ("acdc", ["database/training"], ["has no folders patient001 to patient100"]),
        ("polyp", ["CVC-ClinicDB/Original/9.tif"], ["Original lacks 9"]),
        ("polyp", ["CVC-ClinicDB/Ground Truth/9.tif"], ["Ground Truth lacks 9"]),
        (
            "polyp",
            [f"CVC-ClinicDB/{part}/{n}.tif" for part in ("Original", "Ground Truth") for n in (9, 611)],
            ["has 610 pictures, and no known collection has so many (CVC-ClinicDB 612, "],
        ),
        ("polyp", ["CVC-ClinicDB/Ground Truth"], ["has no folders of images and masks"]),
    ],
)
def test_what_is_missing_is_named(own, nnunet, kind, missing, texts):
    source = own(kind)
    for path in missing:
        shutil.rmtree(source / path) if (source / path).is_dir() else (source / path).unlink()
    refuse(kind, source, nnunet, *texts)


@pytest.mark.parametrize("kind", ["synapse", "acdc", "polyp"])
def test_archives(tmp_path, nnunet, kind):
    archive = tmp_path / "download" / "RawData.ZIP"
    archive.parent.mkdir()
    archive.write_bytes(b"PK")
    refuse(kind, archive, nnunet, "RawData.ZIP is not a folder: unpack the download")
    refuse(kind, archive.parent, nnunet, "unpack RawData.ZIP first.")


def cut(file: Path) -> None:
    whole = file.read_bytes()
    replace(file, whole[: len(whole) - 9])


def rewrite(file: Path, array, **placement) -> None:
    file.unlink()
    write_volume(file, array, **placement)


LABEL, IMAGE = ("RawData/Training/" + name for name in ("label/label0031.nii.gz", "img/img0031.nii.gz"))
GT = "database/training/patient050/patient050_frame01_gt.nii.gz"
INFO = "database/training/patient050/Info.cfg"
MASK = "CVC-ClinicDB/Ground Truth/77.tif"
GOOD = np.zeros((4, 8, 8), np.uint8)
SPOILED = {
    "empty": ("synapse", IMAGE, lambda file: replace(file, b""), "lacks img/img0031.nii.gz"),
    "an error page": (
        "synapse",
        IMAGE,
        lambda file: replace(file, b"<html>"),
        "img0031.nii.gz can't be read, so repeat",
    ),
    "cut off": ("synapse", IMAGE, cut, "img0031.nii.gz is damaged, so repeat the download"),
    "another size": (
        "synapse",
        LABEL,
        lambda f: rewrite(f, GOOD[1:]),
        "label0031.nii.gz differs from its image in size (8 × 8 × 3 and 8 × 8 × 4 voxels)",
    ),
    "another spacing": (
        "synapse",
        LABEL,
        lambda f: rewrite(f, GOOD, spacing=(1, 1, 5)),
        "differs from its image in spacing (1 × 1 × 5 and 1.5 × 1.5 × 5 mm)",
    ),
    "14": (
        "synapse",
        LABEL,
        lambda f: rewrite(f, GOOD + 14),
        "label0031.nii.gz has values other than 0 to 13 (14 to 14)",
    ),
    "negative": ("synapse", LABEL, lambda f: rewrite(f, GOOD.astype(np.int16) - 1), "other than 0 to 13 (-1 to -1)"),
    "halves": ("synapse", LABEL, lambda f: rewrite(f, GOOD + np.float32(0.5)), "other than 0 to 13 (0.5 to 0.5)"),
    "4": ("acdc", GT, lambda f: rewrite(f, GOOD + 4), "patient050_frame01_gt.nii.gz has values other than 0 to 3"),
    "no phases": ("acdc", INFO, lambda f: replace(f, b"ED: one\nES: 9\n"), "Info.cfg doesn't say which frames are ED"),
    "another frame": (
        "acdc",
        INFO,
        lambda f: replace(f, b"ED: 1\nES: 29\n"),
        "lacks patient050/patient050_frame29.nii.gz",
    ),
    "mask of another size": (
        "polyp",
        MASK,
        lambda f: (f.unlink(), write_picture(f, draw_picture("a", (9, 9))[1])),
        "has 9 × 9 pixels, but its image 16 × 12: repeat",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_files_that_are_not_as_they_should_be(own, nnunet, name):
    kind, file, spoil, text = SPOILED[name]
    source = own(kind)
    spoil(source / file)
    refuse(kind, source, nnunet, text)


def test_labels_that_lie_elsewhere_by_their_header(own, nnunet):
    """nnU-Net trains on them with a warning, so they are no reason to refuse real data."""
    source = own("synapse")
    rewrite(source / LABEL, GOOD, origin=(0, 0, 0))
    result = CliRunner().invoke(main, ["convert", "synapse", str(source)])
    assert (
        result.exit_code == 0
        and "lie elsewhere than their images, which nnU-Net ignores: label0031.nii.gz." in result.stdout
    )
