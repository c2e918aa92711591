"""Files as nnU-Net's own readers see them: labels, spacing, orientation, origin; what is no segmentation."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from PIL import Image

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.segmentations import (
    find_reader,
    guess_ending,
    has_scale,
    list_labels,
    list_values,
    read_segmentation,
    read_spacing,
    require_same_grid,
)
from tests.nnunet.files import save


def test_the_ending_is_that_of_the_only_kind_of_files(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz", "._c.png", "notes.txt"):
        (tmp_path / name).touch()
    assert guess_ending(tmp_path) == ".nii.gz"
    (tmp_path / "d.nrrd").touch()
    with pytest.raises(LoMixError, match=r"must have files of one kind that nnU-Net reads, not \.nii\.gz, \.nrrd: set"):
        guess_ending(tmp_path)


def test_readers_are_nnunets(tmp_path):
    file = save(np.zeros((3, 4, 5), np.uint8), tmp_path / "a.nii.gz")
    assert find_reader({"file_ending": ".nii.gz"}, file) is SimpleITKIO
    with pytest.raises(LoMixError, match="No reader of nnU-Net can read .*a.xyz"):
        find_reader({"file_ending": ".xyz"}, tmp_path / "a.xyz")


def test_scales():
    assert has_scale(SimpleITKIO, False) and has_scale(Tiff3DIO, True)
    assert not has_scale(Tiff3DIO, False) and not has_scale(NaturalImage2DIO, True)


def test_labels_and_regions(tmp_path):
    labels = {"background": 0, "liver": 1, "tumour": 2}
    assert list_labels(tmp_path, {"labels": labels}) == ({"liver": (1,), "tumour": (2,)}, None)
    regions = {"background": 0, "all": [1, 2], "tumour": 2, "ignore": 3}
    described = {"labels": regions, "regions_class_order": [1, 2]}
    assert list_labels(tmp_path, described) == ({"all": (1, 2), "tumour": (2,)}, 3)


@pytest.mark.parametrize(
    "labels, reason",
    [
        ({"background": 0, "all": [1, 2]}, "regions_class_order"),
        ({"liver": 1}, "Background"),
        ({"0": "background", "1": "liver"}, "Background"),  # nnU-Net v1's
        (["background", "liver"], "keys"),
        ({"background": 0, "liver": None}, "int"),
        ({"background": 0, "x": 100_000_000}, "end at 100000000, but nnU-Net's at 65535"),
        ({"background": 0, "x": -1}, "begin at -1"),
    ],
)
def test_wrong_labels_are_named(tmp_path, labels, reason):
    with pytest.raises(LoMixError, match=f"{tmp_path}/dataset.json .*{reason}"):
        list_labels(tmp_path, {"labels": labels})


def test_values_beyond_nnunets_are_refused(tmp_path):
    """A list of all values up to that of a stray voxel would fill the memory."""
    labels = np.zeros((3, 4, 5), np.int32)
    labels[0, 0, :2] = 1, 2
    assert list_values(save(labels, tmp_path / "a.nii.gz"), SimpleITKIO) == {0, 1, 2}
    labels[0, 0, 0] = 100_000_000
    with pytest.raises(LoMixError, match=r"a\.nii\.gz has the value 100000000, .* 65535"):
        list_values(save(labels, tmp_path / "a.nii.gz"), SimpleITKIO)


HALVES, NEGATIVE = np.full((3, 4, 5), 0.5, np.float32), np.full((3, 4, 5), -1, np.int16)


@pytest.mark.parametrize(
    "array, name, message",
    [
        (HALVES, "x.nii.gz", "x.nii.gz .*it needs one channel of whole numbers, not 0.5.$"),
        (HALVES, "x_0000.nii.gz", "x_0000.nii.gz .*whole numbers, not 0.5, and _0000 marks images"),
        (NEGATIVE, "x.nii.gz", "x.nii.gz has negative labels, which nnU-Net doesn't know"),
        (NEGATIVE, "x_0000.nii.gz", "x_0000.nii.gz .*negative values, and _0000 marks images"),
        (None, "case_7.nii.gz", r"can't read .*case_7\.nii\.gz"),
    ],
)
def test_what_is_no_segmentation_is_refused_by_name(tmp_path, array, name, message):
    (tmp_path / name).write_bytes(b"not an image")
    if array is not None:
        save(array, tmp_path / name)
    with pytest.raises(LoMixError, match=message):
        read_segmentation(tmp_path / name, SimpleITKIO)


def test_a_json_file_beside_another_kind_of_file_is_no_spacing(tmp_path):
    (tmp_path / "a.json").write_text('{"spacing": [9, 9, 9]}')
    assert read_spacing(tmp_path / "a.tif", Tiff3DIO) == (9, 9, 9)
    assert read_spacing(tmp_path / "a.tif", NaturalImage2DIO) is None
    assert read_spacing(tmp_path / "a.nrrd", SimpleITKIO) is None


def test_2d_images_of_any_depth_are_scored(tmp_path):
    """8-bit BMP files have a palette, and PNG files may have 1 bit a pixel."""
    mask = np.hypot(*(np.indices((14, 12)) - 6)) < 4
    for name, ending in (("palette", "bmp"), ("grey", "png")):
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / f"{name}.{ending}")
    Image.fromarray(mask).save(tmp_path / "bits.png")
    for file in ("palette.bmp", "grey.png", "bits.png"):
        labels, grid = read_segmentation(tmp_path / file, NaturalImage2DIO)
        assert np.array_equal(labels, mask) and grid.spacing == (1, 1)


def placed(file: Path, origin=(0.0, 0.0, 0.0), direction=None, spacing=(0.7, 0.8, 3.0), shape=(40, 300, 300)):
    """A segmentation with spacing and origin in ITK's order x, y, z."""
    labels = np.zeros(shape, np.uint8)
    labels[..., 3:5, 3:5] = 1
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(spacing[: len(shape)])
    image.SetOrigin(origin[: len(shape)])
    direction = np.eye(3) if direction is None else direction
    image.SetDirection(direction[: len(shape), : len(shape)].ravel())
    sitk.WriteImage(image, file)
    return file


def rotation(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def check(reference: Path, prediction: Path, reader=SimpleITKIO, placed=True):
    (_, expected), (_, own) = (read_segmentation(file, reader) for file in (reference, prediction))
    require_same_grid(prediction, own, expected, placed)


FAR = {"origin": (-1500.0, 200.0, 77.0)}
SHIFTED = {"origin": (-1498.6, 200.0, 77.0)}
SLICE = {"origin": (5, 6, 7), "shape": (1, 30, 30)}
TINY = {"spacing": (1e-4, 1e-4, 1e-4)}  # as of a microscope
VOLUMES = [
    (FAR, SHIFTED, "1.4"),
    (FAR, {"origin": (-1500.0, 200.0, 76.6)}, "0.4"),
    (FAR, {"direction": rotation(0.009)}, "2.9"),  # 299 voxels of 0.7 and 0.8 mm: 318 mm
    # less than a quarter of the smallest spacing, 0.175 mm
    (FAR, {"spacing": (0.7005, 0.8, 3.0)}, None),
    (FAR, {"origin": (-1500.0, 200.0, 77.1)}, None),
    (FAR, {"origin": (-1500.0, 200.001, 77.0), "direction": rotation(1e-4)}, None),
]
OF_ITK = [
    (FAR | {"shape": (300, 300)}, SHIFTED, "1.4"),
    (TINY, {"origin": (0, 0, 1e-4)}, r"0\.0001"),
    (SLICE, {"origin": (5, 6, 9)}, "2"),
    (SLICE, {}, None),
    (SLICE, {"shape": (30, 30)}, "inf"),  # a flat file doesn't say where it lies along the third axis
]


@pytest.mark.parametrize(
    "reader, ending, common, change, distance",
    [(reader, "nii.gz", *case) for reader in (SimpleITKIO, NibabelIO) for case in VOLUMES]
    + [(SimpleITKIO, "mha", *case) for case in OF_ITK],
)
def test_what_counts_is_how_far_apart_voxels_lie(tmp_path, reader, ending, common, change, distance):
    reference = placed(tmp_path / f"r.{ending}", **common)
    prediction = placed(tmp_path / f"p.{ending}", **common | change)
    if distance is None:
        check(reference, prediction, reader)
        return
    with pytest.raises(LoMixError, match=rf"p\.{ending} has another origin or .* up to {distance} mm"):
        check(reference, prediction, reader)
    check(reference, prediction, reader, placed=False)


def test_shapes_are_compared_exactly(tmp_path):
    files = [placed(tmp_path / f"{n}.mha", shape=(n, 8)) for n in (1500, 1501)]
    with pytest.raises(LoMixError, match=r"1501\.mha has the shape 1501 × 8, but its reference 1500 × 8"):
        check(*files)


def test_a_file_with_one_channel_lies_where_one_without_does(tmp_path):
    """SimpleITK's fourth axis, of which nnU-Net makes channels, is no direction in space."""
    three = placed(tmp_path / "3.mha", direction=rotation(0.3), shape=(4, 30, 30), **FAR)
    image = sitk.JoinSeries([sitk.ReadImage(str(three))])
    sitk.WriteImage(image, tmp_path / "4.mha")
    check(three, tmp_path / "4.mha")
    assert np.array_equal(*(read_segmentation(tmp_path / f"{n}.mha", SimpleITKIO)[0] for n in "34"))
