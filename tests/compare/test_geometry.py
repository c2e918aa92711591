"""Where voxels are, as nnU-Net's own readers see it: spacing, orientation, origin; values that are no label."""

import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from PIL import Image

from nnunet_lomix.compare import compare, read_folders, read_results
from nnunet_lomix.compare.scoring import ScoringSettings, score_case
from nnunet_lomix.compare.segmentations import read_segmentation, read_spacing
from nnunet_lomix.errors import LoMixError
from tests.compare.files import SPACING, save, save_nifti, save_tiff

DATASET = "Dataset009_Toy"


def ball(shift=(0, 0, 0), shape=(16, 14, 12)) -> np.ndarray:
    """A ball of label 1 with a core of label 2."""
    distance = np.linalg.norm(np.indices(shape).T - (np.array(shape) / 2 + shift), axis=-1).T
    return (distance < 4).astype(np.uint8) + (distance < 2)


def describe(ending: str, **more) -> dict:
    return {"labels": {"background": 0, "ball": 1, "core": 2}, "file_ending": ending, **more}


def train(folder: Path, trainer: str, reader: type[BaseReaderWriter], ending: str) -> Path:
    """A model folder of nnU-Net; gives the folder of its validation."""
    model = folder / "results" / DATASET / f"{trainer}__nnUNetPlans__3d_fullres"
    (model / "fold_0" / "validation").mkdir(parents=True)
    (model / "dataset.json").write_text(json.dumps(describe(ending)))
    plans = {
        "image_reader_writer": reader.__name__,
        "configurations": {"3d_fullres": {"spacing": list(SPACING), "architecture": {}}},
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
    }
    (model / "plans.json").write_text(json.dumps(plans))
    return model / "fold_0" / "validation"


@pytest.fixture
def nnunet(tmp_path, monkeypatch) -> Path:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    for place in ("raw/{}/imagesTr", "raw/{}/labelsTr", "preprocessed/{}/gt_segmentations"):
        (tmp_path / place.format(DATASET)).mkdir(parents=True)
    return tmp_path


def read():
    return read_results("9", "3d_fullres", ["A", "B"])


def value(result, metric: str, trainer: str, name="ball") -> float:
    rows = result.scores.query("metric == @metric and trainer == @trainer and `class` == @name")
    return float(rows["value"].iloc[0])


# 3D TIFF: the spacing is in a JSON file beside


@pytest.fixture
def tiffs(nnunet) -> Path:
    """As nnU-Net leaves a dataset with 3D TIFFs: it copies no JSON file to ``gt_segmentations``."""
    raw = nnunet / "raw" / DATASET
    image = save_tiff(ball().astype(np.float32), raw / "imagesTr" / "a_0000.tif")
    (raw / "imagesTr" / "a.json").write_text(json.dumps({"spacing": SPACING}))
    label = save_tiff(ball(), raw / "labelsTr" / "a.tif", SPACING)
    shutil.copy(label, nnunet / "preprocessed" / DATASET / "gt_segmentations")
    _, properties = Tiff3DIO().read_images([str(image)])
    for trainer, shift in {"A": (0, 0, 0), "B": (0, 1, 0)}.items():
        validation = train(nnunet, trainer, Tiff3DIO, ".tif")
        Tiff3DIO().write_seg(ball(shift), str(validation / "a.tif"), properties)
    return nnunet


def forget_raw_labels(nnunet: Path):
    shutil.rmtree(nnunet / "raw" / DATASET / "labelsTr")


def forget_predicted_spacings(nnunet: Path):
    for file in nnunet.glob("results/*/*/fold_0/validation/a.json"):
        file.unlink()


@pytest.mark.parametrize("damage", [lambda nnunet: None, forget_raw_labels, forget_predicted_spacings])
def test_tiff_datasets_have_their_spacing(tiffs, damage, capsys):
    damage(tiffs)
    assert read().files["a"].spacing == SPACING  # for the pictures
    result = compare(read())
    assert value(result, "HD95", "A") == 0
    assert value(result, "HD95", "B") == 3.0  # a shift by one slice
    assert "Assuming spacing" not in capsys.readouterr().out  # nnU-Net's reader would, and we don't


def test_tiffs_without_any_spacing_have_voxels_of_1(tiffs):
    assert read().distance_unit == "mm"
    forget_raw_labels(tiffs), forget_predicted_spacings(tiffs)
    assert read().distance_unit == "pixels"
    assert value(compare(read()), "HD95", "B") == 1.0


def test_tiffs_of_another_spacing_are_refused(tiffs):
    (tiffs / "raw" / DATASET / "labelsTr" / "a.json").write_text(json.dumps({"spacing": (1, 1, 1)}))
    with pytest.raises(LoMixError, match=r"a\.tif has the spacing 0\.5 × 3 × 0\.7, but its reference 1 × 1 × 1"):
        compare(read())


@pytest.mark.parametrize("with_spacing", ["truth", "old", "new"])
def test_one_tiff_with_a_spacing_is_enough(tmp_path, with_spacing):
    """Trainers aren't compared by different spacings, whichever of the files has one."""
    for name, shift in {"truth": (0, 0, 0), "old": (0, 1, 0), "new": (0, -1, 0)}.items():
        save_tiff(ball(shift), tmp_path / name / "a.tif", SPACING if name == with_spacing else None)
        (tmp_path / name / "dataset.json").write_text(json.dumps(describe(".tif")))
    result = compare(read_folders(tmp_path / "truth", [tmp_path / "old", tmp_path / "new"]))
    assert value(result, "HD95", "old") == value(result, "HD95", "new") == 3.0


def test_a_spacing_that_is_added_changes_known_scores(tmp_path):
    for name, shift in {"truth": (0, 0, 0), "old": (0, 1, 0), "new": (0, -1, 0)}.items():
        save_tiff(ball(shift), tmp_path / name / "a.tif")
        (tmp_path / name / "dataset.json").write_text(json.dumps(describe(".tif")))

    def far() -> float:
        source = read_folders(tmp_path / "truth", [tmp_path / "old", tmp_path / "new"])
        return value(compare(source, cache_file=tmp_path / "cache.json"), "HD95", "old")

    assert far() == 1.0
    (tmp_path / "new" / "a.json").write_text(json.dumps({"spacing": SPACING}))
    assert far() == 3.0


def test_a_json_file_beside_another_kind_of_file_is_no_spacing(tmp_path):
    (tmp_path / "a.json").write_text('{"spacing": [9, 9, 9]}')
    assert read_spacing(tmp_path / "a.tif", Tiff3DIO) == (9, 9, 9)
    assert read_spacing(tmp_path / "a.tif", NaturalImage2DIO) is None
    assert read_spacing(tmp_path / "a.nrrd", SimpleITKIO) is None


# readers that reorient


REORIENTING = pytest.mark.parametrize("reader", [NibabelIOWithReorient, SimpleITKIOWithReorient])


@REORIENTING
@pytest.mark.parametrize("reference, image", [("RAS", "LPS"), ("LPS", "RAS"), ("ASR", "LPS"), ("RAS", "ASR")])
def test_the_orientation_in_which_a_file_is_stored_is_of_no_matter(tmp_path, reader, reference, image):
    for name in ("truth", "old", "new"):
        (tmp_path / name).mkdir()
        described = describe(".nii.gz", overwrite_image_reader_writer=reader.__name__)
        (tmp_path / name / "dataset.json").write_text(json.dumps(described))
    save_nifti(ball(), tmp_path / "truth" / "a.nii.gz", reference)
    for name, shift in {"old": (0, 0, 0), "new": (0, 1, 0)}.items():
        # as nnU-Net writes a prediction: by the reader of the image, and stored as the image is
        stored = save_nifti(ball(shift), tmp_path / "images" / f"{name}.nii.gz", image)
        voxels, properties = reader().read_images([str(stored)])
        reader().write_seg(voxels[0].astype(np.uint8), str(tmp_path / name / "a.nii.gz"), properties)
    result = compare(read_folders(tmp_path / "truth", [tmp_path / "old", tmp_path / "new"]))
    assert value(result, "HD95", "old") == 0 and value(result, "Dice", "old") == 1
    assert value(result, "HD95", "new") == pytest.approx(3.0)


# tolerances


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


FAR_ORIGIN = (-1500.0, 200.0, 77.0)
SHIFTED = {"origin": (-1498.6, 200.0, 77.0)}
ROTATED = {"direction": rotation(0.009)}


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
@pytest.mark.parametrize(
    "change, distance",
    [
        (SHIFTED, "1.4"),
        ({"origin": (-1500.0, 200.0, 76.6)}, "0.4"),
        (ROTATED, "2.9"),  # 299 voxels of 0.7 and 0.8 mm: 318 mm
        ({"spacing": (0.7005, 0.8, 3.0)}, "0.15"),
        ({"origin": (-1500.0, 200.0, 77.1)}, None),
        ({"origin": (-1500.0, 200.001, 77.0), "direction": rotation(1e-4)}, None),
    ],
)
def test_what_counts_is_how_far_apart_voxels_lie(tmp_path, reader, change, distance):
    reference = placed(tmp_path / "r.nii.gz", FAR_ORIGIN)
    prediction = placed(tmp_path / "p.nii.gz", **{"origin": FAR_ORIGIN, **change})
    settings = ScoringSettings({"x": (1,)}, None, reader)
    if distance in (None, "0.15"):  # less than a quarter of the smallest spacing, 0.175 mm
        assert score_case(reference, {"p": prediction}, settings)
        return
    with pytest.raises(LoMixError, match=rf"p\.nii\.gz has another origin or .* up to {distance} mm"):
        score_case(reference, {"p": prediction}, settings)
    assert score_case(reference, {"p": prediction}, replace(settings, placed=False))


def test_a_shift_in_2d_is_found(tmp_path):
    options = {"shape": (300, 300), "origin": FAR_ORIGIN}
    files = [placed(tmp_path / f"{name}.mha", **options | change) for name, change in (("r", {}), ("p", SHIFTED))]
    with pytest.raises(LoMixError, match=r"up to 1\.4 mm"):
        score_case(files[0], {"p": files[1]}, ScoringSettings({"x": (1,)}, None, SimpleITKIO))


def test_microscopic_images_have_microscopic_tolerances(tmp_path):
    spacing = (1e-4, 1e-4, 1e-4)
    reference = placed(tmp_path / "r.mha", spacing=spacing)
    moved = placed(tmp_path / "p.mha", (0, 0, 1e-4), spacing=spacing)
    with pytest.raises(LoMixError, match=r"up to 0\.0001 mm"):
        score_case(reference, {"p": moved}, ScoringSettings({"x": (1,)}, None, SimpleITKIO))


def test_shapes_are_compared_exactly(tmp_path):
    files = [placed(tmp_path / f"{n}.mha", shape=(n, 8)) for n in (1500, 1501)]
    with pytest.raises(LoMixError, match=r"1501\.mha has the shape 1501 × 8, but its reference 1500 × 8"):
        score_case(files[0], {"p": files[1]}, ScoringSettings({"x": (1,)}, None, SimpleITKIO))


def test_a_file_with_one_channel_lies_where_one_without_does(tmp_path):
    """SimpleITK's fourth axis, of which nnU-Net makes channels, is no direction in space."""
    three = placed(tmp_path / "3.mha", FAR_ORIGIN, rotation(0.3), shape=(4, 30, 30))
    image = sitk.JoinSeries([sitk.ReadImage(str(three))])
    sitk.WriteImage(image, tmp_path / "4.mha")
    settings = ScoringSettings({"x": (1,)}, None, SimpleITKIO)
    scores = score_case(three, {"p": tmp_path / "4.mha"}, settings)["p"].scores
    assert scores == {"x": {"Dice": 1, "NSD": 1, "HD95": 0, "IoU": 1}}


def test_a_single_slice_lies_where_it_lies(tmp_path):
    options = {"shape": (1, 30, 30)}
    reference, same, moved = (
        placed(tmp_path / f"{name}.mha", origin=(5, 6, z), **options) for name, z in (("r", 7), ("same", 7), ("m", 9))
    )
    settings = ScoringSettings({"x": (1,)}, None, SimpleITKIO)
    assert score_case(reference, {"p": same}, settings)
    with pytest.raises(LoMixError, match=r"m\.mha .* up to 2 mm"):
        score_case(reference, {"p": moved}, settings)


# values that are no label


def in_folders(folder: Path, labels: dict[str, np.ndarray], described: dict | None = None, cases="ab"):
    for name, array in labels.items():
        for case in cases:
            save(array, folder / name / f"{case}.nii.gz")
        if described:
            (folder / name / "dataset.json").write_text(json.dumps(described))
    return folder / "truth", [folder / name for name in labels if name != "truth"]


@pytest.mark.parametrize("stray", [3, 2**24])
def test_a_stray_value_costs_nothing_and_is_told(tmp_path, stray):
    labels = ball().astype(np.int32)
    strayed = labels.copy()
    strayed[0, 0, 0] = stray
    source = read_folders(*in_folders(tmp_path, {"truth": labels, "A": labels, "B": strayed}, describe(".nii.gz")))
    result = compare(source)
    assert result.scores.query("metric == 'Dice'")["value"].eq(1).all()
    (note,) = result.information["notes"]
    assert f"no label count as background, {stray} in B's predictions of 2 cases (a, b):" in note
    tracemalloc.start()
    compare(source)  # the second time, as the first one loads libraries
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6  # a list of all values up to 2^24 has 134 MB


def test_masks_of_0_and_255_get_a_hint(tmp_path):
    mask = (ball() > 0).astype(np.uint8)
    described = describe(".nii.gz") | {"labels": {"background": 0, "ball": 1}}
    source = read_folders(*in_folders(tmp_path, {"truth": mask, "A": mask, "B": 255 * mask}, described))
    for _ in range(2):  # the second time, everything is known
        result = compare(source, cache_file=tmp_path / "cache.json")
        assert value(result, "Dice", "B") == 0
        (note,) = result.information["notes"]
        assert "255 in B's predictions of 2 cases (a, b)" in note


def test_values_between_labels_are_told(tmp_path):
    """Without dataset.json the labels are the values of the references, here 1 and 3."""
    truth, predicted = ball(), ball()
    truth[truth == 2] = 3
    result = compare(read_folders(*in_folders(tmp_path, {"truth": truth, "A": truth, "B": predicted})))
    (note,) = result.information["notes"]
    assert "background, 2 in B's predictions of 2 cases (a, b): if" in note


def test_references_of_0_and_255_get_a_hint(tmp_path):
    mask = (ball() > 0).astype(np.uint8)
    described = describe(".nii.gz") | {"labels": {"background": 0, "ball": 1, "ignore": 2}}
    truth = 255 * mask
    truth[0] = 2
    result = compare(read_folders(*in_folders(tmp_path, {"truth": truth, "A": mask, "B": mask}, described)))
    (note,) = result.information["notes"]
    assert "255 in the references of 2 cases (a, b)" in note and "2 in" not in note


def test_references_with_values_beyond_nnunets_are_refused_by_name(tmp_path):
    """Without dataset.json all values of the references are classes, and one for a stray voxel would pull the mean."""
    labels = ball().astype(np.int32)
    folders = in_folders(tmp_path, {"truth": labels, "A": labels, "B": labels})
    labels[0, 0, 0] = 100_000_000
    save(labels, tmp_path / "truth" / "b.nii.gz")
    with pytest.raises(LoMixError, match=r"truth/b\.nii\.gz has the value 100000000, .* 65535"):
        read_folders(*folders)


def test_labels_beyond_nnunets_are_refused(tmp_path):
    described = describe(".nii.gz") | {"labels": {"background": 0, "x": 100_000_000}}
    with pytest.raises(LoMixError, match=r"dataset\.json .*100000000"):
        read_folders(*in_folders(tmp_path, {"truth": ball(), "A": ball(), "B": ball()}, described))


# files of macOS


def test_cases_without_any_spacing_among_others_are_named(tmp_path):
    for name in ("truth", "old", "new"):
        for case, spacing in (("a", SPACING), ("b", None)):
            save_tiff(ball(), tmp_path / name / f"{case}.tif", spacing)
        (tmp_path / name / "dataset.json").write_text(json.dumps(describe(".tif")))
    result = compare(read_folders(tmp_path / "truth", [tmp_path / "old", tmp_path / "new"]))
    (note,) = result.information["notes"]
    assert "no spacing of b, so their voxels count as 1 mm" in note


@pytest.mark.parametrize("name", ["._a", ".hidden"])
def test_names_that_begin_with_a_dot_are_no_cases(tmp_path, name):
    truth, folders = in_folders(tmp_path, {"truth": ball(), "A": ball(), "B": ball()})
    for folder in (truth, *folders):
        (folder / f"{name}.nii.gz").write_bytes(b"\0\5\26\7")
        (folder / "._dataset.json").write_bytes(b"\0\5\26\7")
        (folder / "._a.png").write_bytes(b"\0\5\26\7")  # no second kind of files
    assert list(read_folders(truth, folders).references) == ["a", "b"]


def test_hidden_files_are_neither_validations_nor_references(nnunet):
    for trainer in "AB":
        validation = train(nnunet, trainer, SimpleITKIO, ".nii.gz")
        save(ball(), validation / "a.nii.gz")
        (validation / "._a.nii.gz").write_bytes(b"\0\5\26\7")
        other = validation.parents[1] / "fold_1" / "validation"
        other.mkdir(parents=True)
        (other / "._b.nii.gz").write_bytes(b"\0\5\26\7")
    references = nnunet / "preprocessed" / DATASET / "gt_segmentations"
    save(ball(), references / "a.nii.gz")
    (references / "._a.nii.gz").write_bytes(b"\0\5\26\7")
    source = read()
    assert list(source.references) == ["a"] and source.folds == ("0",)


# 2D images


def test_2d_images_of_any_depth_are_scored(tmp_path):
    """8-bit BMP files have a palette, and PNG files may have 1 bit a pixel."""
    mask = ball()[8] > 0
    for name, ending in (("palette", "bmp"), ("grey", "png")):
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / f"{name}.{ending}")
    Image.fromarray(mask).save(tmp_path / "bits.png")
    for file in ("palette.bmp", "grey.png", "bits.png"):
        labels, grid = read_segmentation(tmp_path / file, NaturalImage2DIO)
        assert np.array_equal(labels, mask) and grid.spacing == (1, 1)
