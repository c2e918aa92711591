"""Polyps in all layouts, and pictures and masks in all forms."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from PIL import Image

from nnunet_lomix.convert import convert
from nnunet_lomix.convert.polyp import find, split, write_image, write_mask
from nnunet_lomix.errors import LoMixError

from .downloads import draw_picture, read_all, write_layout, write_picture

MASK = np.array([[0, 0, 1], [1, 1, 0]], np.uint8)


def test_kvasir(tmp_path):
    source = tmp_path / "Kvasir-SEG"
    names = [f"cju{number * 7919:x}" for number in range(1000)]
    write_layout(source / "images", source / "masks", names, ".jpg")
    (source / "kavsir_bboxes.json").write_text("{}")
    download = find(source)
    assert (download.name, download.notes) == ("KvasirSEG", [])
    assert [len(part) for part in (download.train, download.val, download.test)] == [800, 100, 100]
    (source / "images" / f"{names[0]}.jpg").unlink()
    (source / "masks" / f"{names[0]}.jpg").unlink()
    with pytest.raises(LoMixError, match="has 999 pictures, and no known collection has so many"):
        find(source)


def test_masks_saved_as_jpeg_have_noise(tmp_path):
    mask = np.zeros((2, 4, 3), np.uint8)
    mask[..., 1] = [[0, 8, 127, 128], [247, 255, 0, 3]]
    for name, pixels in (("colour", mask), ("grey", mask[..., 1])):
        write_picture(tmp_path / f"{name}.png", pixels)
        write_mask(tmp_path / f"{name}.png", tmp_path / "written.png")
        assert read_back(tmp_path / "written.png") == [[0, 0, 0, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("mode", ["1.bmp", "1.png", "L.tif", "LA.png", "P.tif", "RGB.png", "RGBA.png"])
def test_masks_and_pictures_of_any_mode_are_read(tmp_path, mode):
    file, written = tmp_path / mode, tmp_path / "written.png"
    Image.fromarray(255 * MASK).convert(file.stem).save(file)
    write_mask(file, written)
    assert read_back(written) == MASK.tolist()
    write_image(file, written)
    assert read_back(written) == (255 * MASK[..., None].repeat(3, axis=-1)).tolist()


@pytest.mark.parametrize("values", [MASK, 7 * MASK, 65535 * MASK.astype(np.uint16)])
def test_two_values_are_a_mask_whatever_they_are(tmp_path, values):
    write_picture(tmp_path / "mask.png", values)
    write_mask(tmp_path / "mask.png", tmp_path / "written.png")
    assert read_back(tmp_path / "written.png") == MASK.tolist()


@pytest.mark.parametrize(
    "write, pixels, text",
    [
        (write_mask, np.full((3, 4), 127, np.uint8), "picture.png has no polyp, as its values end at 127: masks"),
        (write_mask, np.zeros((3, 4), np.uint8), "picture.png has no polyp, as its values end at 0: masks"),
        (write_mask, np.arange(12, dtype=np.uint16).reshape(3, 4), "has 12 values from 0 to 11, of the kind I;16, but"),
        (write_image, np.ones((3, 4), np.uint16), "picture.png has pixels of the kind I;16: convert it to a PNG of 8"),
    ],
)
def test_pictures_that_are_not_as_they_should_be(tmp_path, write, pixels, text):
    write_picture(tmp_path / "picture.png", pixels)
    with pytest.raises(LoMixError, match=text):
        write(tmp_path / "picture.png", tmp_path / "written.png")
    assert not (tmp_path / "written.png").exists()


def read_back(file: Path) -> list:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file))).tolist()


def test_etis_calls_its_masks_p(tmp_path):
    source = tmp_path / "download"
    write_layout(source / "ETIS-LaribPolypDB", source / "Ground Truth", range(1, 197), ".tif", "p")
    download = find(source)
    assert download.name == "ETISLaribPolypDB" and len(download.cases) == 196
    assert [file.name for file in download.cases["007"]] == ["7.tif", "p7.tif"]


def test_a_split_of_the_download_is_kept(tmp_path):
    """As LoMix's repository offers it."""
    source = tmp_path / "ClinicDB"
    parts = {"train": range(1, 491), "val": range(491, 552), "test": range(552, 613)}
    for part, numbers in parts.items():
        write_layout(source / part / "images", source / part / "masks", numbers, ".png")
    download = find(source)
    assert download.name == "CVCClinicDB" and not download.notes
    for part, numbers in parts.items():
        assert sorted(getattr(download, part)) == [f"{number:03}" for number in numbers]
    shutil.copytree(source / "train", source / "test", dirs_exist_ok=True)
    with pytest.raises(LoMixError, match="has 1102 pictures, and no known"):
        find(source)


def test_pranet(tmp_path):
    source = tmp_path / "download"
    names = [*(f"cju{number}" for number in range(900)), *range(1, 551)]
    write_layout(source / "TrainDataset/image", source / "TrainDataset/mask", names, ".png")
    tests = {"CVC-300": 60, "CVC-ClinicDB": 62, "CVC-ColonDB": 380, "ETIS-LaribPolypDB": 196, "Kvasir": 100}
    for name, count in tests.items():
        place = source / "TestDataset" / name
        write_layout(place / "images", place / "masks", range(count), ".png")
    download = find(source)
    assert download.name == "PraNet" and (len(download.train), len(download.test), download.val) == (1450, 798, [])
    assert "CVC-ColonDB_007" in download.test and "TrainDataset_007" in download.train
    assert download.cases["CVC-300_007"].image == source / "TestDataset/CVC-300/images/7.png"
    with pytest.raises(LoMixError, match="is not one collection, as it has CVC-300, CVC-ClinicDB, "):
        find(source / "TestDataset")


def test_pictures_in_two_formats_are_one_collection(tmp_path):
    for ending in ("png", "tif"):
        place = tmp_path / ending.upper()
        write_layout(place / "Original", place / "Ground Truth", range(1, 613), f".{ending}")
    assert {case.image.suffix for case in find(tmp_path).cases.values()} == {".png"}


@given(st.integers(20, 900), st.randoms())
def test_the_draw_depends_on_names_alone(count, random):
    names = [f"{number:03}" for number in range(count)]
    parts = split(names)
    assert sorted(sum(parts.values(), [])) == names
    assert len(parts["val"]) == len(parts["test"]) == int(count / 10 + 0.5)
    random.shuffle(names)
    assert {part: sorted(own) for part, own in split(names).items()} == {p: sorted(own) for p, own in parts.items()}


def test_names_that_become_one_are_refused(own):
    folder = own("polyp") / "CVC-ClinicDB"
    for part in ("Original", "Ground Truth"):
        (folder / part / "2.tif").rename(folder / part / "01.tif")
    with pytest.raises(LoMixError, match="has pictures whose names differ by zeros or spaces alone"):
        find(folder)


def test_clinicdb(whole, nnunet):
    folder = convert("polyp", whole["polyp"])
    description, folds, labels = read_all(folder)
    assert folder.name == "Dataset603_CVCClinicDB" and description["labels"] == {"background": 0, "polyp": 1}
    assert description["channel_names"] == {"0": "R", "1": "G", "2": "B"} and description["file_ending"] == ".png"
    assert [(len(fold["train"]), len(fold["val"])) for fold in folds] == [(490, 61), (490, 61)] + 3 * [(25, 61)]
    assert not set(folds[0]["val"]) & set(folds[1]["val"])
    for number in range(1, 613):
        picture, mask = draw_picture(str(number))
        assert np.array_equal(labels[f"{number:03}"], mask // 255)
        if number % 50 == 0:  # nnU-Net's own reader
            channels, _ = NaturalImage2DIO().read_images([str(folder / f"imagesTr/{number:03}_0000.png")])
            assert np.array_equal(channels[:, 0], picture.transpose(2, 0, 1))
