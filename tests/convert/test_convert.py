"""Converters, on generated downloads in exactly the layouts of the real ones, with all their cases."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import CliRunner
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

from nnunet_lomix.cli import main
from nnunet_lomix.convert import DATASETS, convert
from nnunet_lomix.errors import LoMixError
from tests.conftest import NnUNet

from .downloads import (
    SCANS,
    draw_labels,
    draw_picture,
    es_frame,
    write_acdc,
    write_clinicdb,
    write_picture,
    write_synapse,
    write_volume,
)

# the labels of BTCV, as its site lists them
BTCV = ["background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta"]
BTCV += ["inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland"]
LEVELS = {
    "synapse": ("", "RawData", "RawData/Training"),
    "acdc": ("", "database", "database/training"),
    "polyp": ("", "CVC-ClinicDB"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """The three downloads, not to be changed."""
    folder = tmp_path_factory.mktemp("downloads")
    makers = {"synapse": write_synapse, "acdc": write_acdc, "polyp": write_clinicdb}
    return {kind: make(folder / kind) for kind, make in makers.items()}


@pytest.fixture
def nnunet(tmp_path, monkeypatch) -> NnUNet:
    """nnU-Net's folders, which aren't there yet."""
    nnunet = NnUNet(tmp_path / "nnunet")
    for variable, folder in nnunet.variables.items():
        if variable.startswith("nnUNet_r") or variable.startswith("nnUNet_p"):
            monkeypatch.setenv(variable, folder)
    return nnunet


@pytest.fixture
def own(tmp_path, whole):
    """Gives a copy of a download, to spoil; its files are links, so replace them rather than write into them."""

    def copy(kind: str) -> Path:
        return shutil.copytree(whole[kind], tmp_path / "own" / kind, copy_function=lambda a, b: Path(b).hardlink_to(a))

    return copy


def read_all(folder: Path) -> tuple[dict, list, dict[str, np.ndarray]]:
    """``dataset.json``, the folds, and the labels of all cases."""
    description = json.loads((folder / "dataset.json").read_text())
    ending = description["file_ending"]
    labels = {
        file.name.removesuffix(ending): sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        for file in sorted((folder / "labelsTr").iterdir())
    }
    images = {file.name.removesuffix(f"_0000{ending}") for file in (folder / "imagesTr").iterdir()}
    assert images == set(labels) and description["numTraining"] == len(labels)
    folds = json.loads((folder / "splits_final.json").read_text())
    assert {case for fold in folds for part in fold.values() for case in part} == set(labels)
    for fold in folds:
        assert not set(fold["train"]) & set(fold["val"])
        assert all(len(set(part)) == len(part) for part in fold.values())
    return description, folds, labels


def require_nothing(nnunet: NnUNet) -> None:
    left = [path for root in (nnunet.raw, nnunet.preprocessed) if root.exists() for path in root.iterdir()]
    assert not left, left


def refuse(kind: str, source: Path, nnunet: NnUNet, *texts: str) -> None:
    """It is refused with these texts, and nothing is written."""
    with pytest.raises(LoMixError) as raised:
        convert(kind, source)
    message = str(raised.value)
    assert all(text in message for text in texts), message
    require_nothing(nnunet)


def test_synapse(whole, nnunet):
    folder = convert("synapse", whole["synapse"])
    assert folder == nnunet.raw / "Dataset601_Synapse"
    description, folds, labels = read_all(folder)
    assert description["channel_names"] == {"0": "CT"}
    tested = [1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38]
    assert folds[0]["val"] == [f"case{scan:04}" for scan in tested]
    assert folds[0]["train"] == [f"case{scan:04}" for scan in SCANS if scan not in tested]
    assert [(len(fold["train"]), fold["val"]) for fold in folds[1:]] == [(1, folds[0]["val"])] * 3
    classes = description["labels"]
    assert len(classes) == 9
    for scan in SCANS:
        truth = draw_labels(f"scan {scan}", 13)
        case = f"case{scan:04}"
        for value, organ in enumerate(BTCV):
            assert (labels[case][truth == value] == classes.get(organ, 0)).all(), organ
        before = whole["synapse"] / f"RawData/Training/img/img{scan:04}.nii.gz"
        assert (folder / f"imagesTr/{case}_0000.nii.gz").read_bytes() == before.read_bytes()
    written, before = (sitk.ReadImage(str(file)) for file in (folder / f"labelsTr/{case}.nii.gz", before))
    for of in ("Spacing", "Origin", "Direction"):
        assert getattr(written, f"Get{of}")() == getattr(before, f"Get{of}")()
    assert written.GetPixelID() == sitk.sitkUInt8


def test_acdc(whole, nnunet):
    folder = convert("acdc", whole["acdc"])
    description, folds, labels = read_all(folder)
    assert folder.name == "Dataset602_ACDC" and description["channel_names"] == {"0": "cineMRI"}
    assert len(labels) == 200 and len(description["labels"]) == 4
    for patient in range(1, 101):
        name = f"patient{patient:03}"
        for phase, frame in (("ED", 1), ("ES", es_frame(patient))):
            assert np.array_equal(labels[f"{name}_{phase}"], draw_labels(f"{name} {frame}", 3))
        for fold in folds[:2]:  # both frames on one side
            sides = [[case.startswith(name) for case in fold[part]].count(True) for part in ("train", "val")]
            assert sides in ([2, 0], [0, 2], [0, 0])
    assert [(len(fold["train"]), len(fold["val"])) for fold in folds] == [(140, 40), (140, 20)] + 3 * [(7, 40)]
    assert folds[0]["train"] == folds[1]["train"] and not set(folds[0]["val"]) & set(folds[1]["val"])
    tested = {int(case[7:10]) for case in folds[0]["val"]}
    assert tested == {2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95}
    assert {int(case[7:10]) for case in folds[1]["val"]} == {19, 21, 29, 33, 41, 50, 61, 71, 76, 80}
    name = f"patient033_frame{es_frame(33):02}.nii.gz"
    before = whole["acdc"] / "database/training/patient033" / name
    assert (folder / "imagesTr/patient033_ES_0000.nii.gz").read_bytes() == before.read_bytes()


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


@pytest.mark.parametrize("kind, level", [(kind, level) for kind, levels in LEVELS.items() for level in levels[1:]])
def test_any_folder_of_the_download_will_do(whole, kind, level):
    """What is found is the same; finding doesn't write."""
    found, expected = (DATASETS[kind](folder) for folder in (whole[kind] / level, whole[kind]))
    assert found.cases == expected.cases and found.train == expected.train and found.test == expected.test


def test_acdc_as_it_was_at_first(tmp_path, nnunet):
    assert len(read_all(convert("acdc", write_acdc(tmp_path / "ACDC", (2, 4, 4), within="")))[2]) == 200


def test_folds_are_where_nnunet_looks_for_them(whole, nnunet):
    raw = convert("synapse", whole["synapse"], 77)
    beside = nnunet.preprocessed / "Dataset077_Synapse"
    assert [file.name for file in beside.iterdir()] == ["splits_final.json"]
    assert (beside / "splits_final.json").read_text() == (raw / "splits_final.json").read_text()
    assert sorted(file.name for file in raw.iterdir()) == ["dataset.json", "imagesTr", "labelsTr", "splits_final.json"]


@pytest.mark.parametrize("root", ["raw", "preprocessed", "results"])
def test_a_number_that_is_taken(whole, nnunet, root):
    taken = getattr(nnunet, root) / "Dataset601_Other"
    taken.mkdir(parents=True)
    with pytest.raises(LoMixError, match="There is a dataset 601, .*Dataset601_Other: give another number by -d"):
        convert("synapse", whole["synapse"])
    assert not list(nnunet.folder.rglob("*Synapse*"))
    convert("synapse", whole["synapse"], 611)


def test_the_command(whole, nnunet):
    result = CliRunner().invoke(main, ["convert", "synapse", str(whole["synapse"])], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert "nnUNetv2_plan_and_preprocess -d 601 --verify_dataset_integrity\n" in result.stdout
    assert "against the test cases" in result.stdout and not result.stderr
    result = CliRunner().invoke(main, ["convert", "acdc", str(whole["synapse"])])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1


# downloads that aren't whole


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


@pytest.mark.parametrize("kind", LEVELS)
def test_archives(tmp_path, nnunet, kind):
    archive = tmp_path / "download" / "RawData.ZIP"
    archive.parent.mkdir()
    archive.write_bytes(b"PK")
    refuse(kind, archive, nnunet, "RawData.ZIP is not a folder: unpack the download")
    refuse(kind, archive.parent, nnunet, "unpack RawData.ZIP first.")


def replace(file: Path, content: bytes) -> None:
    """Another file in its place, as it may be a link."""
    file.unlink()
    file.write_bytes(content)


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
        lambda f: write_picture(f, draw_picture("a", (9, 9))[1]),
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


# folders that appear once they are whole


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_whatever_ends_it_leaves_nothing(whole, nnunet, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("nnunet_lomix.convert.write_splits", fail)
    with pytest.raises(type(error)):
        convert("synapse", whole["synapse"])
    require_nothing(nnunet)


def test_other_forms_of_the_same_volumes_are_read(own, nnunet):
    """Not packed, in a folder of its name, or packed by its name alone; an Info.cfg with the mark of another editor."""
    source = own("acdc")
    for number, patient in enumerate(("patient001", "patient002", "patient003", "patient004")):
        packed = source / f"database/training/{patient}/{patient}_frame01.nii.gz"
        plain = packed.with_suffix("")
        pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(packed)))
        packed.unlink()
        if number < 2:
            write_volume(plain, pixels)
        elif number == 2:
            write_volume(plain / plain.name, pixels)
        else:
            write_volume(plain, pixels).rename(packed)
    info = source / "database/training/patient001/Info.cfg"
    replace(info, b"\xef\xbb\xbf" + info.read_bytes())
    folder = convert("acdc", source)
    for patient in ("patient001", "patient002", "patient003", "patient004"):
        image = sitk.ReadImage(str(folder / f"imagesTr/{patient}_ED_0000.nii.gz"))
        assert np.array_equal(sitk.GetArrayFromImage(image), 50 * draw_labels(f"{patient} 1", 3))
        assert image.GetSpacing() == (1.5, 1.5, 5.0) and image.GetPixelID() == sitk.sitkInt16
        assert (folder / f"imagesTr/{patient}_ED_0000.nii.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_without_variables(whole, nnunet, monkeypatch):
    monkeypatch.delenv("nnUNet_preprocessed")
    refuse("synapse", whole["synapse"], nnunet, "nnUNet_preprocessed is not set")


@pytest.mark.end_to_end
def test_nnunet_plans_what_was_converted(tmp_path, nnunet):
    """Its check of the dataset passes, and it keeps our folds."""
    raw = convert("synapse", write_synapse(tmp_path / "download", (4, 32, 32)))
    options = ("-d", 601, "-npfp", 1, "--verify_dataset_integrity", "--no_pp")
    output = nnunet.run("nnUNetv2_plan_and_preprocess", *options, nnUNet_n_proc_DA="1")
    assert "your dataset is most likely OK" in output and "WARNING" not in output
    beside = nnunet.preprocessed / raw.name
    assert (beside / "nnUNetPlans.json").is_file()
    assert (beside / "splits_final.json").read_text() == (raw / "splits_final.json").read_text()
