"""Pictures of cases: read as nnU-Net reads them, whatever the files are."""

import io

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from PIL import Image

from nnunet_lomix.compare.overlays import CLASS_COLOURS, draw_overlays
from nnunet_lomix.compare.sources import Source
from nnunet_lomix.errors import LoMixError
from tests.nnunet.files import save, save_nifti, save_tiff

SHAPE = (9, 8, 7)


def block(*corner, shape=SHAPE, size=2) -> np.ndarray:
    """A block of label 1."""
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(c, c + size) for c in corner)] = 1
    return labels


def case(reference, predictions, image=None, reader=SimpleITKIO, spacing=None) -> Source:
    return Source(
        references={"a": reference},
        predictions={(trainer, 0): {"a": file} for trainer, file in predictions.items()},
        folders={},
        labels={"x": (1,)},
        ignore=None,
        reader=reader,
        dataset="test",
        label_source="test",
        images={"a": image} if image else {},
        spacings={"a": spacing} if spacing else {},
    )


def draw(source: Source, values=(1,)) -> tuple[dict[str, bytes], str]:
    pictures, where, _ = draw_overlays(source, "a", values)
    return pictures, where


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png))[..., :3]


def where_coloured(png: bytes) -> np.ndarray:
    """Pixels with the first class over a black ground."""
    half = np.array(to_rgb(CLASS_COLOURS[0])) / 2
    return np.abs(pixels(png) - half).max(axis=-1) < 0.02


# files of all kinds


@pytest.mark.parametrize("reader", [NibabelIOWithReorient, SimpleITKIOWithReorient])
@pytest.mark.parametrize("stored", ["LPS", "RAS", "ASR", "PIR"])
def test_the_orientation_in_which_a_file_is_stored_moves_nothing(tmp_path, reader, stored):
    """References, predictions and images may be stored in different orientations; nnU-Net makes them one."""
    rng = np.random.default_rng(0)
    arrays = {"r": block(4, 3, 3), "p": block(4, 3, 2), "i": rng.random(SHAPE).astype(np.float32)}
    alike = {name: save_nifti(array, tmp_path / f"{name}.nii.gz", "LPS") for name, array in arrays.items()}
    expected = draw(case(alike["r"], {"A": alike["p"]}, alike["i"], reader))
    for changed in "rpi":
        files = alike | {changed: save_nifti(arrays[changed], tmp_path / f"{changed}_.nii.gz", stored)}
        assert draw(case(files["r"], {"A": files["p"]}, files["i"], reader)) == expected
    assert expected[1] == f"slice 4 of {SHAPE[1]}"


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO, NibabelIOWithReorient])
@pytest.mark.parametrize("stored", ["LPS", "RAS"])
def test_patients_lie_as_in_clinics(tmp_path, reader, stored):
    """Up is the front or the head, and the patient's left is on the right, however a file is stored."""
    spacings = {0: (3.0, 1.0, 1.0), 1: (1.0, 3.0, 1.0), 2: (1.0, 1.0, 3.0)}
    # the left front upper corner of the body, in an array of LPS: z upwards, y to the back, x to the left
    labels = block(SHAPE[0] - 2, 0, SHAPE[2] - 2) | block(*np.array(SHAPE) // 2, size=1)
    for axis, (rows, columns) in {0: ("top", "right"), 1: ("top", "right"), 2: ("top", "left")}.items():
        file = save_nifti(labels, tmp_path / f"{axis}.nii.gz", stored, spacings[axis])
        pictures, _ = draw(case(file, {"A": file}, reader=reader))
        coloured = where_coloured(pictures["A"])
        middle = np.array(coloured.shape) / 2
        row, column = (where.mean() for where in np.nonzero(coloured))
        assert ("top" if row < middle[0] else "bottom", "left" if column < middle[1] else "right") == (rows, columns)


def test_pictures_have_the_proportions_of_the_body(tmp_path):
    file = save_nifti(block(4, 3, 3), tmp_path / "r.nii.gz", "LPS", (3.0, 2.0, 1.0))
    height, width, _ = pixels(draw(case(file, {"A": file}))[0]["A"]).shape
    assert height / width == pytest.approx(2 * SHAPE[1] / SHAPE[2], rel=0.02)


def test_colours_are_grey_grounds(tmp_path):
    """An RGB image is all channels in one file, and its mean is the ground."""
    mask = block(3, 2, shape=(12, 10), size=5)
    levels = np.random.default_rng(0).integers(0, 250, (12, 10)).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "r.png")
    Image.fromarray(levels).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([levels - levels % 2, levels, levels + levels % 2], axis=-1)).save(tmp_path / "rgb.png")
    grey, rgb, none = (
        draw(case(tmp_path / "r.png", {"A": tmp_path / "r.png"}, ground, NaturalImage2DIO))
        for ground in (tmp_path / "grey.png", tmp_path / "rgb.png", None)
    )
    assert grey == rgb != none


def test_an_image_that_cannot_be_read_or_does_not_fit_is_left_out(tmp_path):
    reference, prediction = save(block(4, 3, 3), tmp_path / "r.mha"), save(block(4, 3, 2), tmp_path / "p.mha")
    (tmp_path / "broken.mha").write_bytes(b"broken")
    images = {
        "none": None,
        "broken": tmp_path / "broken.mha",
        "missing": tmp_path / "missing.mha",
        "larger": save(np.random.default_rng(0).random((10, 9, 8)), tmp_path / "larger.mha"),
        "flat": save(np.random.default_rng(0).random((9, 8)), tmp_path / "flat.mha"),
    }
    pictures = [draw(case(reference, {"A": prediction}, image)) for image in images.values()]
    assert all(picture == pictures[0] for picture in pictures)


def test_segmentations_of_other_shapes_are_refused(tmp_path):
    reference = save(block(4, 3, 3), tmp_path / "r.mha")
    prediction = save(block(4, 3, shape=(9, 8)), tmp_path / "p.mha")
    with pytest.raises(LoMixError, match=r"p\.mha has the shape 9 × 8, but its reference 9 × 8 × 7"):
        draw(case(reference, {"A": prediction}))


# which slice


def test_the_slice_with_most_differences_is_shown(tmp_path):
    shape = (6, 10, 10)
    arrays = [np.zeros(shape, np.uint8) for _ in range(3)]
    for array in arrays:
        array[2, 2:8, 2:8] = 1  # the largest slice, where all agree
    arrays[1][4, 3:5, 3:5] = 1
    arrays[0][4, 3, 3] = 1
    arrays[1][5] = 1  # false positives without reference would be a picture without outlines
    paths = [save(array, tmp_path / f"{i}.nii.gz") for i, array in enumerate(arrays)]
    pictures, where = draw(case(paths[0], {"A": paths[1], "B": paths[2]}))
    assert where == "slice 5 of 6"
    assert pictures["A"] != pictures["B"] and pictures["A"].startswith(b"\x89PNG")


def test_where_there_is_no_reference_any_slice_will_do(tmp_path):
    arrays = [np.zeros((4, 5, 5), np.uint8) for _ in range(2)]
    arrays[1][2, 1:3] = 1
    paths = [save(array, tmp_path / f"{i}.nii.gz") for i, array in enumerate(arrays)]
    assert draw(case(paths[0], {"A": paths[0], "B": paths[1]}))[1] == "slice 3 of 4"


@pytest.mark.parametrize("shape, spacing, where", [((9, 8, 7), (1, 4, 1), "of 8"), ((9, 8, 1), (4, 1, 1), "of 1")])
def test_the_slice_is_across_the_coarsest_or_the_only_axis(tmp_path, shape, spacing, where):
    """The spacing of a TIFF is that of the case, wherever it is from."""
    nifti = save_nifti(np.ones(shape, np.uint8), tmp_path / "x.nii.gz", spacing=spacing)
    tiff = save_tiff(np.ones(shape, np.uint8), tmp_path / "x.tif")
    assert draw(case(nifti, {"A": nifti}))[1].endswith(where)
    assert draw(case(tiff, {"A": tiff}, reader=Tiff3DIO, spacing=spacing))[1].endswith(where)


# colours


def test_outlines_have_the_colours_of_their_classes(tmp_path):
    """Two neighbours, of which nothing is predicted: their outlines are the only colours, and none is white."""
    labels = np.zeros((40, 40), np.uint8)
    labels[8:32, 8:20], labels[8:32, 20:32] = 1, 2
    reference, nothing = save(labels, tmp_path / "r.mha"), save(np.zeros_like(labels), tmp_path / "p.mha")
    pictures, _, values = draw_overlays(case(reference, {"A": nothing}), "a", [1, 2, 3])
    assert values == {1, 2}  # of those that are asked for, what the legend should name

    def where(colour: str) -> np.ndarray:
        return np.argwhere(np.abs(pixels(pictures["A"]) - to_rgb(colour)).max(axis=-1) < 0.12)[:, 1]

    left, right = where(CLASS_COLOURS[0]), where(CLASS_COLOURS[1])
    assert len(left) > 100 and len(right) > 100
    assert not len(where("#ffffff"))
    # side by side where they touch: neither is covered by the other
    assert left.max() < right.min()
