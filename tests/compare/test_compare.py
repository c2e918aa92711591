"""Whole comparisons of files: spacing, orientation, values that are no label; the command."""

import io
import json
import re
import shutil
import tracemalloc
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from rich.console import Console
from skimage.io import imsave

from nnunet_lomix.cli import Lists, main
from nnunet_lomix.compare import compare, compare_into, read_folders, read_results
from nnunet_lomix.errors import LoMixError
from tests.compare.trees import DATASET
from tests.nnunet.files import SPACING, save, save_nifti, save_tiff


def ball(shift=(0, 0, 0), shape=(16, 14, 12)) -> np.ndarray:
    """A ball of label 1 with a core of label 2."""
    distance = np.linalg.norm(np.indices(shape).T - (np.array(shape) / 2 + shift), axis=-1).T
    return (distance < 4).astype(np.uint8) + (distance < 2)


def describe(folder: Path, ending: str, **more):
    description = {"labels": {"background": 0, "ball": 1, "core": 2}, "file_ending": ending, **more}
    (folder / "dataset.json").write_text(json.dumps(description))


def read_plain(folder: Path):
    return read_folders(folder / "truth", [folder / "old", folder / "new"])


def value(result, metric: str, trainer: str, name="ball") -> float:
    rows = result.scores.query("metric == @metric and trainer == @trainer and `class` == @name")
    return float(rows["value"].iloc[0])


# 3D TIFF: the spacing is in a JSON file beside


@pytest.fixture
def tiffs(trees) -> Path:
    """As nnU-Net leaves a dataset with 3D TIFFs: it copies no JSON file to ``gt_segmentations``."""
    raw = trees.folder / "raw" / DATASET
    image = save_tiff(ball().astype(np.float32), raw / "imagesTr" / "a_0000.tif")
    (raw / "imagesTr" / "a.json").write_text(json.dumps({"spacing": SPACING}))
    shutil.copy(save_tiff(ball(), raw / "labelsTr" / "a.tif", SPACING), trees.references)
    _, properties = Tiff3DIO().read_images([str(image)])
    for trainer, shift in {"A": (0, 0, 0), "B": (0, 1, 0)}.items():
        trees.add(trainer, reader="Tiff3DIO")
        describe(trees.model(trainer), ".tif")
        Tiff3DIO().write_seg(ball(shift), str(trees.model(trainer) / "fold_0" / "validation" / "a.tif"), properties)
    return trees.folder


def compare_tiffs():
    return compare(read_results("9", "2d", ["A", "B"]), metrics=["Dice", "HD95"])


def forget_raw_labels(folder: Path):
    shutil.rmtree(folder / "raw" / DATASET / "labelsTr")


def forget_predicted_spacings(folder: Path):
    for file in folder.glob("results/*/*/fold_0/validation/a.json"):
        file.unlink()


@pytest.mark.parametrize("damage", [lambda folder: None, forget_raw_labels, forget_predicted_spacings])
def test_tiff_datasets_have_their_spacing(tiffs, damage, capsys):
    damage(tiffs)
    result = compare_tiffs()
    assert result.source.spacings["a"] == SPACING and result.source.distance_unit == "mm"
    assert value(result, "HD95", "A") == 0
    assert value(result, "HD95", "B") == 3.0  # a shift by one slice
    assert "Assuming spacing" not in capsys.readouterr().out  # nnU-Net's reader would, and we don't


def test_tiffs_without_any_spacing_have_voxels_of_1(tiffs):
    forget_raw_labels(tiffs), forget_predicted_spacings(tiffs)
    result = compare_tiffs()
    assert result.source.distance_unit == "pixels" and value(result, "HD95", "B") == 1.0


def test_tiffs_of_another_spacing_are_refused(tiffs):
    (tiffs / "raw" / DATASET / "labelsTr" / "a.json").write_text(json.dumps({"spacing": (1, 1, 1)}))
    with pytest.raises(LoMixError, match=r"a\.tif has the spacing 0\.5 × 3 × 0\.7, but its reference 1 × 1 × 1"):
        compare_tiffs()


@pytest.mark.parametrize("with_spacing", ["truth", "old", "new"])
def test_one_tiff_with_a_spacing_is_enough(tmp_path, with_spacing):
    """Trainers aren't compared by different spacings, whichever of the files has one; one that is added counts."""
    for name, shift in {"truth": (0, 0, 0), "old": (0, 1, 0), "new": (0, -1, 0)}.items():
        for case in "ab":
            save_tiff(ball(shift), tmp_path / name / f"{case}.tif")
        describe(tmp_path / name, ".tif")

    def measure():
        return compare(read_plain(tmp_path), metrics=["HD95"], cache_file=tmp_path / "cache.json")

    assert value(measure(), "HD95", "old") == value(measure(), "HD95", "new") == 1.0
    (tmp_path / with_spacing / "a.json").write_text(json.dumps({"spacing": SPACING}))
    result = measure()
    assert value(result, "HD95", "old") == value(result, "HD95", "new") == 3.0
    (note,) = result.information["notes"]
    assert "no spacing of b, so their voxels count as 1 mm" in note


# readers that reorient


@pytest.mark.parametrize("reader", [NibabelIOWithReorient, SimpleITKIOWithReorient])
@pytest.mark.parametrize("reference, image", [("RAS", "LPS"), ("LPS", "RAS"), ("ASR", "LPS"), ("RAS", "ASR")])
def test_the_orientation_in_which_a_file_is_stored_is_of_no_matter(tmp_path, reader, reference, image):
    save_nifti(ball(), tmp_path / "truth" / "a.nii.gz", reference)
    describe(tmp_path / "truth", ".nii.gz", overwrite_image_reader_writer=reader.__name__)
    for name, shift in {"old": (0, 0, 0), "new": (0, 1, 0)}.items():
        # as nnU-Net writes a prediction: by the reader of the image, and stored as the image is
        stored = save_nifti(ball(shift), tmp_path / "images" / f"{name}.nii.gz", image)
        voxels, properties = reader().read_images([str(stored)])
        (tmp_path / name).mkdir()
        reader().write_seg(voxels[0].astype(np.uint8), str(tmp_path / name / "a.nii.gz"), properties)
    result = compare(read_plain(tmp_path), metrics=["Dice", "HD95"])
    assert value(result, "HD95", "old") == 0 and value(result, "Dice", "old") == 1
    assert value(result, "HD95", "new") == pytest.approx(3.0)


# values that are no label


def compare_labels(folder: Path, truth: np.ndarray, old: np.ndarray, new: np.ndarray, labels=None):
    """Two cases in plain folders, with or without a dataset.json; scored twice, the second time from the cache."""
    for name, array in {"truth": truth, "old": old, "new": new}.items():
        for case in "ab":
            save(array, folder / name / f"{case}.nii.gz")
    if labels:
        describe(folder / "truth", ".nii.gz", labels=labels)
    results = [compare(read_plain(folder), metrics=["Dice"], cache_file=folder / "cache.json") for _ in range(2)]
    assert results[0].information == results[1].information
    return results[0]


@pytest.mark.parametrize("stray", [3, 2**24])
def test_a_stray_value_costs_nothing_and_is_told(tmp_path, stray):
    labels = ball().astype(np.int32)
    strayed = labels.copy()
    strayed[0, 0, 0] = stray
    result = compare_labels(tmp_path, labels, labels, strayed)
    assert result.scores["value"].eq(1).all()
    (note,) = result.information["notes"]
    assert f"no label count as background, {stray} in new's predictions of 2 cases (a, b):" in note
    tracemalloc.start()
    compare(result.source, metrics=["Dice"])  # the second time, as the first one loads libraries
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6  # a list of all values up to 2^24 has 134 MB


MASK = (ball() > 0).astype(np.uint8)
FLAT = np.where(np.arange(16)[:, None, None] == 0, 2, 255 * MASK)  # the first slice is ignored
GAP = np.where(ball() == 2, 3, ball())


@pytest.mark.parametrize(
    "truth, old, new, labels, told",
    [
        (MASK, MASK, 255 * MASK, {"background": 0, "ball": 1}, "255 in new's predictions"),
        (FLAT, MASK, MASK, {"background": 0, "ball": 1, "ignore": 2}, "255 in the references"),
        # without a dataset.json the labels are the values of the references, here 1 and 3
        (GAP, GAP, ball(), None, "2 in new's predictions"),
    ],
)
def test_values_that_are_no_label_get_a_hint(tmp_path, truth, old, new, labels, told):
    result = compare_labels(tmp_path, truth, old, new, labels)
    (note,) = result.information["notes"]
    assert f"background, {told} of 2 cases (a, b): if they mean a label" in note
    assert value(result, "Dice", "new", "1" if labels is None else "ball") == (labels is None)


# files without a scale


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_distances_without_a_scale_are_pixels_everywhere(tmp_path, ending):
    """A square of 10 × 10 pixels, and the same moved by 2 pixels."""
    for name, shift in (("truth", 0), ("old", 0), ("new", 2)):
        (tmp_path / name).mkdir()
        for case in "ab":
            mask = np.zeros((30, 30), np.uint8)
            mask[10:20, 10 + shift : 20 + shift] = 1
            imsave(tmp_path / name / f"{case}{ending}", mask, check_contrast=False)
    printed = io.StringIO()
    compare_into(tmp_path / "out", read_plain(tmp_path), Console(file=printed, width=80), tolerance=2)
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert scores.query("metric == 'HD95' and trainer == 'new'")["value"].tolist() == [2.0, 2.0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == 4 and "not drawn" not in page and "could not be drawn" not in page
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
    note = "no scale, so that distances (HD95 and the tolerance of the NSD) are in pixels, not in mm"
    for name in ("html", "md", "printed"):
        assert note in texts[name] and "HD95, pixels, lower is better" in texts[name], name
    assert "within 2 pixels of" in texts["html"] and "2.0 pixels larger" in texts["printed"]
    content = json.loads(texts["json"])
    assert content["units"]["HD95"] == content["information"]["distance_unit"] == "pixels"
    assert content["information"]["tolerance_pixels"] == 2


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


def test_command_on_results(pair):
    pair.add("C", 3)
    output = run("-d", 9, "-c", "2d", "-tr", "A", "B", "C", "-f", 0, 1, "--jobs", 1, "--out", "report")
    assert re.search("B.*mean Dice.* 3 cases", output)
    scores = pd.read_csv("report/scores.csv")
    assert len(scores) == 3 * 2 * 3 * 4 and set(scores["trainer"]) == set("ABC")
    assert {"report.html", "comparison.json"} <= {file.name for file in Path("report").iterdir()}


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
        ("--references data --predictions old new -f 0", "-p, -f and --results belong to -d"),
        ("--references data --predictions old new -p nnUNetPlans", "-p, -f and --results belong to -d"),
        ("-d 4 -c 2d --trainers A B --images images", "--images belongs to --references"),
        ("-d 9 -c 2d -tr A", "only A"),
        ("-d 77 -c 2d --trainers A B", "dataset with the ID 77: check -d"),
        ("-d 9 -c 2d --trainers A B --out file/report", "file/report can't be written (Not a directory)"),
        ("-d 9 -c 2d --trainers A B --tolerance -1", "tolerance"),
    ],
)
def test_mistakes_give_a_sentence_and_write_nothing(pair, line, message):
    (pair.folder / "file").touch()
    output = run(*line.split(), fails=True)
    assert message in output and "Traceback" not in output
    assert not (pair.folder / "nnunet_lomix_compare").exists()
