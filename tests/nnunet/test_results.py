"""Results folders, against the names and files that nnU-Net itself gives and writes."""

import json
import os

import pytest
import torch
from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.results import FoldFolder, ModelFolder, read_dataset_json, read_json

from .test_checkpoints import a_checkpoint


@pytest.mark.parametrize("fold", [0, "12", "all"])
def test_folders_are_where_nnunet_writes(tmp_path, monkeypatch, fold):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    model = ModelFolder.of(tmp_path, "Dataset001_A", "nnUNetTrainerLoMix", "nnUNetPlans", "2d")
    expected = get_output_folder("Dataset001_A", "nnUNetTrainerLoMix", "nnUNetPlans", "2d", fold)
    assert str(model.fold(fold).path) == expected
    assert model.fold(fold).fold == str(fold)


def test_folds_of_a_model(tmp_path):
    for name in ("fold_all", "fold_1", "fold_0", "crossval_results_folds_0_1"):
        (tmp_path / name).mkdir()
    (tmp_path / "fold_notes.txt").touch()
    folds = [FoldFolder(tmp_path / name) for name in ("fold_0", "fold_1", "fold_all")]
    assert ModelFolder(tmp_path).folds() == folds
    assert ModelFolder(tmp_path / "crossval_results_folds_0_1").folds() == []


def test_the_last_checkpoint_is_the_one_that_a_training_goes_on_from(tmp_path):
    """As nnU-Net's --c: the final one, or the latest, or the best."""
    fold = FoldFolder(tmp_path)
    assert fold.last_checkpoint() is None and not fold.is_finished()
    for name in ("checkpoint_best.pth", "checkpoint_latest.pth", "checkpoint_final.pth"):
        assert not fold.is_finished()
        (tmp_path / name).touch()
        assert fold.last_checkpoint() == tmp_path / name
    assert fold.is_finished()


@pytest.mark.parametrize(
    ("since_the_epoch", "since_the_validation", "stale"),
    [
        (5, -60, False),
        (5, 60, True),  # trained again
        (86400, 60, False),  # copied, a day later
        (86400, 2 * 86400, True),  # the last epoch, too, ended behind the validation
        (None, 60, True),  # no checkpoint of nnU-Net's: its file's time is all that is known
    ],
)
def test_a_validation_is_of_the_checkpoint_or_of_an_earlier_one(tmp_path, since_the_epoch, since_the_validation, stale):
    fold, now = FoldFolder(tmp_path), 1.7e9
    final, summary, case = (
        tmp_path / "checkpoint_final.pth",
        fold.validation / "summary.json",
        fold.validation / "a.png",
    )
    fold.validation.mkdir()
    case.touch()
    assert not fold.is_validated() and not fold.has_stale_validation()
    final.touch()
    if since_the_epoch is not None:
        torch.save(a_checkpoint(logging={"epoch_end_timestamps": [0.0, now - since_the_epoch]}), final)
    os.utime(final, (now, now))
    os.utime(case, (now - since_the_validation,) * 2)
    assert fold.has_stale_validation() == stale  # interrupted
    summary.touch()
    assert fold.is_validated() and not fold.has_stale_validation()
    os.utime(summary, (now - since_the_validation,) * 2)
    assert (fold.is_validated(), fold.has_stale_validation()) == (not stale, stale)


def test_descriptions_of_a_model(tmp_path):
    model = ModelFolder(tmp_path)
    with pytest.raises(LoMixError, match="plans.json isn't there: name the folder TRAINER__PLANS__CONFIGURATION"):
        model.read_plans()
    plans = {"dataset_name": "Dataset001_A", "plans_name": "nnUNetPlans", "configurations": {}}
    labels = {"labels": {"background": 0}, "file_ending": ".png"}
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    (tmp_path / "dataset.json").write_text(json.dumps(labels))
    assert model.read_plans() == plans
    assert model.read_dataset_json() == read_dataset_json(tmp_path) == labels


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"file.json can't be read: Expecting .*; nnU-Net writes it beside what it trains\.$"),
        ("[]", "file.json is not nnU-Net's"),
        pytest.param("[" * 100_000, "file.json can't be read: maximum recursion depth", id="nested"),
        ('{"a": 1}', "it lacks one of a, b, text, object"),
        ('{"a": 1, "b": 2, "text": 3, "object": {}}', "file.json is not nnU-Net's: its text is not a text."),
        ('{"a": 1, "b": 2, "text": "3", "object": []}', "its object is not an object."),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(LoMixError, match=message):
        read_json(tmp_path / "file.json", "a", "b", text=str, object=dict)
    with pytest.raises(LoMixError, match="no.json isn't there: look elsewhere"):
        read_json(tmp_path / "no.json", "a", remedy="look elsewhere")
