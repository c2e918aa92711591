"""Scores of files, against brute force on whole images and nnU-Net's own Dice and IoU; many cases and their cache."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_lomix.compare import scoring
from nnunet_lomix.compare.scoring import ScoringSettings, choose_settings, score, score_case
from nnunet_lomix.compare.sources import Source
from nnunet_lomix.errors import LoMixError
from tests.compare.oracle import brute_hd95, brute_nsd

LABELS = {"liver": (1,), "tumour": (2,), "both": (1, 2)}
SETTINGS = ScoringSettings(LABELS, ignore=3, reader=SimpleITKIO, tolerance=1.5)


def write(labels: np.ndarray, path: Path, spacing=(5.0, 0.7, 1.0)) -> Path:
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, path)
    return path


def random_labels(seed: int, shape=(6, 14, 12), highest=2) -> np.ndarray:
    """A few boxes of each label, some at the border."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    for value in [*range(1, highest + 1)] * 2:
        corner = [rng.integers(0, n) for n in shape]
        labels[tuple(slice(c, c + rng.integers(1, 7)) for c in corner)] = value
    return labels


@pytest.mark.parametrize("labels", [LABELS, {"all but 2": (0, 1), "2": (2,), "not there but 0": (0, 5)}])
@pytest.mark.parametrize("ignore", [None, 3])
@pytest.mark.parametrize("seed", range(4))
def test_files_equal_brute_force_on_whole_images(tmp_path, labels, ignore, seed):
    """Neither the windows around labels nor the order of the axes may change anything; Dice and IoU are nnU-Net's.

    A region may contain background: nnU-Net's LabelManager allows it.
    """
    expected, predicted = random_labels(seed), random_labels(seed + 100)
    if seed == 0:  # one of two masks is empty
        predicted[predicted == 2] = 0
    if ignore:
        expected[:, 3:5] = ignore
    files = [write(array, tmp_path / f"{i}.nii.gz") for i, array in enumerate((expected, predicted))]
    settings = replace(SETTINGS, labels=labels, ignore=ignore)
    scores = score_case(files[0], {"p": files[1]}, settings)["p"].scores
    theirs = compute_metrics(*map(str, files), SimpleITKIO(), list(labels.values()), ignore)["metrics"]
    spacing = (5.0, 0.7, 1.0)
    for name, values in labels.items():
        own = list(scores[name].values())
        a, b = (np.isin(array, values) & (expected != ignore) for array in (expected, predicted))
        if a.any() and b.any():
            assert [own[0], own[3]] == pytest.approx([theirs[values][key] for key in ("Dice", "IoU")], abs=1e-9), name
            assert own[1] == pytest.approx(brute_nsd(a, b, spacing, 1.5), abs=1e-5), name
            assert own[2] == pytest.approx(brute_hd95(a, b, spacing), rel=1e-5), name
        elif a.any() or b.any():
            assert own == [0, 0, pytest.approx(np.linalg.norm(np.multiply(expected.shape, spacing)), rel=1e-5), 0]
        else:
            assert own == [1, 1, 0, 1]


def test_voxels_elsewhere_in_space_are_refused(tmp_path):
    """The same voxels under another header are another segmentation; in nnU-Net's own results it doesn't look."""
    reference = write(random_labels(0), tmp_path / "reference.nii.gz")
    moved = sitk.ReadImage(str(reference))
    moved.SetOrigin((0, 0, 3))
    sitk.WriteImage(moved, tmp_path / "case_7.nii.gz")
    with pytest.raises(LoMixError, match="case_7.* has another origin or direction"):
        score_case(reference, {"p": tmp_path / "case_7.nii.gz"}, SETTINGS)
    expected = score_case(reference, {"p": reference}, SETTINGS)
    unplaced = replace(SETTINGS, placed=False)
    assert score_case(reference, {"p": tmp_path / "case_7.nii.gz"}, unplaced) == expected


# many cases


@pytest.fixture
def source(tmp_path) -> Source:
    """Three cases, two trainers; the second trainer is perfect."""
    references, predictions = {}, {("A", 0): {}, ("B", 0): {}}
    for i, case in enumerate(("x", "y", "z")):
        references[case] = write(random_labels(i), tmp_path / f"{case}.nii.gz")
        predictions["A", 0][case] = write(random_labels(i + 50), tmp_path / f"{case}_A.nii.gz")
        predictions["B", 0][case] = write(random_labels(i), tmp_path / f"{case}_B.nii.gz")
    return Source(references, predictions, {}, LABELS, None, SimpleITKIO, "test", "test")


@pytest.fixture
def scored(monkeypatch) -> list:
    """Names of the predictions that are scored."""
    names = []
    original = scoring.score_case

    def spy(reference, predictions, *arguments):
        names.extend(file.name for file in predictions.values())
        return original(reference, predictions, *arguments)

    monkeypatch.setattr(scoring, "score_case", spy)
    return names


def score_all(source, metrics=("Dice",), tolerance=1.0, **options):
    return score(source, choose_settings(source, metrics, tolerance), **options)[0]


def test_scores_are_tidy(source):
    scores, notes = score(source, choose_settings(source))
    assert not notes and list(scores) == ["case", "class", "trainer", "seed", "metric", "value"]
    assert len(scores) == 3 * 3 * 2 * 4 and not scores.duplicated(["case", "class", "trainer", "seed", "metric"]).any()
    perfect = scores[scores["trainer"] == "B"].groupby("metric")["value"]
    assert perfect.unique().map(list).to_dict() == {"Dice": [1], "NSD": [1], "HD95": [0], "IoU": [1]}
    assert scores.query("trainer == 'A' and metric == 'Dice'")["value"].max() < 1
    few = score_all(source, ["clDice", "Dice"])
    assert few["metric"].unique().tolist() == ["clDice", "Dice"] and len(few) == 3 * 3 * 2 * 2


def test_scores_of_known_content_are_not_computed_again(source, scored, tmp_path):
    file = tmp_path / "cache.json"
    first = score_all(source, cache_file=file)
    assert len(scored) == 6
    scored.clear()
    assert score_all(source, cache_file=file).equals(first) and scored == []
    write(random_labels(77), source.predictions["A", 0]["y"])
    assert not score_all(source, cache_file=file).equals(first) and scored == ["y_A.nii.gz"]
    scored.clear()
    write(random_labels(78), source.references["z"])
    score_all(source, cache_file=file)
    assert scored == ["z_A.nii.gz", "z_B.nii.gz"]


CHANGES = [{"tolerance": 2.0}, {"labels": {"tumour": (2,)}}, {"ignore": 2}, {"metrics": ["IoU"]}, {"version": 99}]


@pytest.mark.parametrize("change", CHANGES)
def test_scores_are_computed_again_if_their_meaning_changes(source, scored, tmp_path, monkeypatch, change):
    file = tmp_path / "cache.json"
    score_all(source, cache_file=file)
    scored.clear()
    monkeypatch.setattr(scoring, "VERSION", change.pop("version", scoring.VERSION))
    options = {name: change.pop(name) for name in ("metrics", "tolerance") if name in change}
    score_all(replace(source, **change), cache_file=file, **options)
    assert len(scored) == 6


def test_what_was_scored_before_an_error_is_kept(source, scored, tmp_path):
    file = tmp_path / "cache.json"
    write(random_labels(0, (3, 3, 3)), source.predictions["A", 0]["z"])
    with pytest.raises(LoMixError, match="z_A.nii.gz"):
        score_all(source, cache_file=file)
    assert len(json.loads(file.read_text())) == 4
    write(random_labels(0), source.predictions["A", 0]["z"])
    scored.clear()
    score_all(source, cache_file=file)
    assert scored == ["z_A.nii.gz", "z_B.nii.gz"]


@pytest.mark.parametrize("content", ["", '{"a":', "3", '[["a"]]', '{"a": [[1, 1, 0]]}', '{"a": {"scores": 1}}'])
def test_a_damaged_cache_is_made_anew(source, scored, tmp_path, content):
    (tmp_path / "cache.json").write_text(content)
    score_all(source, cache_file=tmp_path / "cache.json")
    assert len(scored) == len(json.loads((tmp_path / "cache.json").read_text())) == 6


def test_scores_are_saved_on_the_way(source, tmp_path, monkeypatch):
    """A job that is killed says no goodbye."""
    file, saved = tmp_path / "cache.json", []
    original = scoring.score_case

    def look(*arguments):
        saved.append(len(json.loads(file.read_text())) if file.exists() else 0)
        return original(*arguments)

    monkeypatch.setattr(scoring, "score_case", look)
    monkeypatch.setattr(scoring, "SAVED_EVERY", 2)
    score_all(source, cache_file=file)
    assert saved == [0, 0, 4]
