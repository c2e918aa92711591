"""Whole comparisons of files: spacing, orientation, values that are no label; the command."""

import io
import json
import re
import shutil
import tracemalloc
from functools import partial
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from PIL import Image
from rich.console import Console
from skimage.io import imsave

from nnunet_lomix.cli import Lists, main
from nnunet_lomix.compare import compare, compare_into, read_folders, read_results
from nnunet_lomix.errors import LoMixError
from tests.nnunet.files import SPACING, save, save_nifti, save_tiff

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
    assert read().spacings["a"] == SPACING  # for the pictures
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


# the whole report


def save_bmp(labels: np.ndarray, file: Path):
    Image.fromarray(labels[4].astype(np.uint8)).save(file)


def save_bits(labels: np.ndarray, file: Path):
    Image.fromarray(labels[4] > 0).save(file)


@pytest.mark.parametrize(
    "ending, write, reader",
    [
        (".nii.gz", partial(save_nifti, orientation="ASR"), "NibabelIOWithReorient"),
        (".nii.gz", partial(save_nifti, orientation="ASR"), "SimpleITKIOWithReorient"),
        (".tif", partial(save_tiff, spacing=SPACING), "Tiff3DIO"),
        (".bmp", save_bmp, "NaturalImage2DIO"),
        (".png", save_bits, "NaturalImage2DIO"),
    ],
)
def test_reports_have_pictures_of_all_kinds_of_files(tmp_path, ending, write, reader):
    for name, column in (("truth", 2), ("old", 3), ("new", 4)):
        (tmp_path / name).mkdir()
        described = {
            "labels": {"background": 0, "x": 1},
            "file_ending": ending,
            "overwrite_image_reader_writer": reader,
        }
        (tmp_path / name / "dataset.json").write_text(json.dumps(described))
        # stored in LPS only the reference would be of another shape than the array of the predictions
        stored = {"orientation": "LPS"} if name == "truth" and ending == ".nii.gz" else {}
        labels = np.zeros((9, 8, 7), np.uint8)
        labels[3:6, 2:5, column : column + 3] = 1
        write(labels, tmp_path / name / f"a{ending}", **stored)
    source = read_folders(tmp_path / "truth", [tmp_path / "old", tmp_path / "new"])
    compare_into(tmp_path / "out", source, Console(file=io.StringIO()))
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == 2 and "not drawn" not in page and "could not be drawn" not in page


# files without a scale


@pytest.fixture(params=[".png", ".bmp", ".tif"])
def without_scale(request, tmp_path):
    """A square of 10 × 10 pixels, and the same moved by 2 pixels."""
    for name, shift in (("truth", 0), ("old", 0), ("new", 2)):
        (tmp_path / name).mkdir()
        for case in "ab":
            mask = np.zeros((30, 30), np.uint8)
            mask[10:20, 10 + shift : 20 + shift] = 1
            imsave(tmp_path / name / f"{case}{request.param}", mask, check_contrast=False)
    return read_folders(tmp_path / "truth", [tmp_path / "old", tmp_path / "new"])


def test_distances_without_a_scale_are_pixels_everywhere(without_scale, tmp_path):
    result = compare(without_scale, tolerance=2)
    assert result.scores.query("metric == 'HD95' and trainer == 'new'")["value"].tolist() == [2.0, 2.0]
    assert result.information["distance_unit"] == "pixels" and result.information["tolerance_pixels"] == 2
    printed = io.StringIO()
    compare_into(tmp_path / "out", without_scale, Console(file=printed, width=80), tolerance=2)
    page = (tmp_path / "out" / "report.html").read_text()
    texts = {
        "html": re.sub(r"<[^>]*>|\s+", " ", page[page.index("<body>") :]),
        "labels": " ".join(re.findall('aria-label="([^"]*)"', page)),
        "md": (tmp_path / "out" / "report.md").read_text(),
        "json": (tmp_path / "out" / "comparison.json").read_text(),
        "printed": re.sub(r"\s+", " ", printed.getvalue()),
    }
    for name, text in texts.items():
        assert "pixels" in text, name
        assert not re.search(r"\bmm\b", text.replace("not in mm", "")), name
    for name in ("html", "md", "printed"):
        assert (
            "no scale, so that distances (HD95 and the tolerance of the NSD) are in pixels, not in mm" in texts[name]
        ), name
        assert "HD95, pixels, lower is better" in texts[name], name
    assert "within 2 pixels of" in texts["html"] and "2.0 pixels larger" in texts["printed"]
    assert json.loads(texts["json"])["units"]["HD95"] == "pixels"


# the command


@pytest.mark.parametrize(
    "line, expected",
    [
        ("-n A B -x 1", (("A", "B"), "1")),
        ("-x 1 --name A B C", (("A", "B", "C"), "1")),
        ("-n A -n B C -x 1", (("A", "B", "C"), "1")),
        ("-x 1", ((), "1")),
        ("-x 1 2", None),
    ],
)
def test_options_take_lists(line, expected):
    seen = []
    options = [click.Option(["-n", "--name"], multiple=True), click.Option(["-x"])]
    command = Lists("test", params=options, callback=lambda name, x: seen.append((name, x)))
    result = CliRunner().invoke(command, line.split())
    assert seen == ([expected] if expected else []) and (result.exit_code == 0) == bool(expected)


def run(*args, fails=False) -> str:
    result = CliRunner().invoke(main, ["compare", *map(str, args)])
    assert (result.exit_code != 0) == fails, result.output
    # a mistake ends in click's own exit, not in an exception of ours
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return " ".join(result.output.split())


def test_command_on_results(trees):
    trees.add("A", 1), trees.add("B", 2), trees.add("C", 3)
    output = run("-d", 9, "-c", "2d", "-tr", "A", "B", "C", "-f", 0, 1, "--jobs", 1, "--out", "report")
    assert re.search("B.*mean Dice.* 3 cases", output)
    scores = pd.read_csv(trees.folder / "report" / "scores.csv")
    assert len(scores) == 3 * 2 * 3 * 4 and set(scores["trainer"]) == set("ABC")
    assert {"report.html", "comparison.json"} <= {file.name for file in (trees.folder / "report").iterdir()}


def test_command_on_folders(folders, monkeypatch):
    monkeypatch.chdir(folders)
    run("--references", "data/truth", "--predictions", "old", "new", "--names", "before", "after", "--jobs", 1)
    assert set(pd.read_csv("nnunet_lomix_compare/scores.csv")["trainer"]) == {"before", "after"}


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "Give -d, -c and --trainers, or --references and --predictions"),
        ("-d 9 -c 2d", "Give -d, -c and --trainers"),
        ("-d 9 -c 2d --trainers A B --references data", "Give -d, -c and --trainers"),
        ("--references data --predictions old new -f 0", "-f and --results belong to -d"),
        ("-d 4 -c 2d --trainers A B --images images", "--images belongs to --references"),
        ("-d 9 -c 2d --trainers A", "only A"),
        ("-d 9 -c 2d -tr A", "only A"),
        ("-d Dataset009_Toi -c 2d -tr A B", "; did you mean Dataset009_Toy?"),
        ("-d 77 -c 2d --trainers A B", "dataset with the ID 77: check -d"),
        ("-d 9 -c 3d --trainers A B", "There is no 'A__nnUNetPlans__3d' in"),
        ("-d 9 -c 2d --trainers A Something", "no 'Something__nnUNetPlans__2d' in"),
        ("-d 9 -c 2d --trainers A B --out file/report", "file/report can't be written (Not a directory)"),
        ("-d 9 -c 2d --trainers A B --tolerance -1", "tolerance"),
    ],
)
def test_mistakes_give_a_sentence_and_write_nothing(trees, line, message):
    trees.add("A"), trees.add("B")
    (trees.folder / "file").touch()
    output = run(*line.split(), fails=True)
    assert message in output and "Traceback" not in output
    assert not (trees.folder / "nnunet_lomix_compare").exists()
