"""Results folders, against the names and files that nnU-Net itself gives and writes."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from nnunetv2.evaluation.evaluate_predictions import save_summary_json
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.checkpoints import CheckpointError
from nnunet_lomix.nnunet.curves import CURVE_COLUMNS, read_all_curves, read_curves
from nnunet_lomix.nnunet.results import (
    FoldFolder,
    ModelFolder,
    list_folds,
    read_dataset_json,
    read_json,
)

from .test_checkpoints import a_checkpoint

# of three epochs, as nnU-Net logs them: a class without a voxel in any patch has no Dice
DICE = [[np.float64(0.5), np.float64("nan")], [np.float64("nan")] * 2, [0.25, 0.75]]
LOSSES = [np.float32(0.5), np.float32(-0.25), np.float32(-0.5)]
STARTS, ENDS = [100.0, 200.0, 1000.0], [150.0, 275.5, 1100.0]


def log_epochs(epochs: int, started: bool = False) -> dict:
    """What nnU-Net's own logger puts into a checkpoint after some epochs; another one may have started."""
    logger = LocalLogger()
    for epoch in range(epochs):
        logger.log("epoch_start_timestamps", STARTS[epoch], epoch)
        logger.log("train_losses", LOSSES[epoch], epoch)
        logger.log("dice_per_class_or_region", DICE[epoch], epoch)
        mean = np.nanmean(DICE[epoch]) if not np.isnan(DICE[epoch]).all() else np.float64("nan")
        logger.log("mean_fg_dice", mean, epoch)
        logger.log("epoch_end_timestamps", ENDS[epoch], epoch)
    if started:
        logger.log("epoch_start_timestamps", STARTS[epochs], epochs)
    return logger.get_checkpoint()


def save(folder: Path, name: str, **content) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(a_checkpoint(**content), folder / name)


@pytest.mark.parametrize("fold", [0, "12", "all"])
def test_folders_are_where_nnunet_writes(tmp_path, monkeypatch, fold):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    model = ModelFolder.of(tmp_path, "Dataset001_A", "nnUNetTrainerLoMix", "nnUNetPlans", "2d")
    expected = get_output_folder("Dataset001_A", "nnUNetTrainerLoMix", "nnUNetPlans", "2d", fold)
    assert str(model.fold(fold).path) == expected
    assert model.fold(fold).fold == str(fold)


def test_folds_of_a_model_or_a_fold_alone(tmp_path):
    for name in ("fold_all", "fold_1", "fold_0", "crossval_results_folds_0_1"):
        (tmp_path / name).mkdir()
    (tmp_path / "fold_notes.txt").touch()
    folds = [FoldFolder(tmp_path / name) for name in ("fold_0", "fold_1", "fold_all")]
    assert ModelFolder(tmp_path).folds() == list_folds(tmp_path) == folds
    assert list_folds(tmp_path / "fold_1") == [folds[1]]
    assert list_folds(tmp_path / "crossval_results_folds_0_1") == []


def test_curves_are_nnunets_log(tmp_path):
    save(tmp_path, "checkpoint_final.pth", logging=log_epochs(3))
    expected = pd.DataFrame(
        {
            "epoch": [0, 1, 2],
            "pseudo_dice": [0.5, math.nan, 0.5],
            "train_loss": [0.5, -0.25, -0.5],
            "seconds": [50.0, 75.5, 100.0],
        }
    )
    pd.testing.assert_frame_equal(read_curves(FoldFolder(tmp_path)), expected)


def test_the_last_checkpoint_is_the_one_that_a_training_goes_on_from(tmp_path):
    """As nnU-Net's --c: the final one, or the latest, or the best."""
    fold = FoldFolder(tmp_path)
    assert fold.last_checkpoint() is None and not fold.is_finished()
    assert read_curves(fold).empty and list(read_curves(fold)) == ["epoch", "pseudo_dice", "train_loss", "seconds"]
    for epochs, name in enumerate(["checkpoint_best.pth", "checkpoint_latest.pth", "checkpoint_final.pth"], 1):
        assert not fold.is_finished()
        save(tmp_path, name, logging=log_epochs(epochs))
        assert fold.last_checkpoint() == tmp_path / name and len(read_curves(fold)) == epochs
    assert fold.is_finished()


def test_an_epoch_that_has_not_ended_is_left_out(tmp_path):
    save(tmp_path, "checkpoint_latest.pth", logging=log_epochs(1, started=True))
    assert list(read_curves(FoldFolder(tmp_path))["seconds"]) == [50.0]


@pytest.mark.parametrize("log", [3, {"train_losses": [[1], [2, 3]]}, {"mean_fg_dice": ["many"]}])
def test_a_log_that_is_none_is_refused(tmp_path, log):
    save(tmp_path, "checkpoint_final.pth", logging=log)
    with pytest.raises(CheckpointError, match="checkpoint_final.pth has a log that nnU-Net doesn't write"):
        read_curves(FoldFolder(tmp_path))


def test_curves_of_several_trainings(tmp_path):
    models = {("A", 0): ModelFolder(tmp_path / "a"), ("A", 1): ModelFolder(tmp_path / "b")}
    assert list(read_all_curves(models, ["0"])) == CURVE_COLUMNS
    save(tmp_path / "a" / "fold_0", "checkpoint_final.pth", logging=log_epochs(1))
    save(tmp_path / "b" / "fold_2", "checkpoint_best.pth", logging=log_epochs(2))
    table = read_all_curves(models, ["0", "2"])
    rows = [("A", 0, "0", 0, 0.5, 0.5, 50), ("A", 1, "2", 0, 0.5, 0.5, 50), ("A", 1, "2", 1, math.nan, -0.25, 75.5)]
    columns = ["trainer", "seed", "fold", "epoch", "pseudo_dice", "train_loss", "seconds"]
    pd.testing.assert_frame_equal(table, pd.DataFrame(rows, columns=columns), check_dtype=False)


def test_the_summary_is_nnunets(tmp_path):
    fold = FoldFolder(tmp_path)
    with pytest.raises(LoMixError, match="validation/summary.json isn't there: run nnUNetv2_train with --val"):
        fold.read_summary()
    fold.validation.mkdir()
    case = {"reference_file": "r", "prediction_file": "p", "metrics": {1: {"Dice": 0.5}, (1, 2): {"Dice": math.nan}}}
    results = {"metric_per_case": [case], "mean": {1: {"Dice": 0.5}}, "foreground_mean": {"Dice": 0.5}}
    save_summary_json(results, str(tmp_path / "validation" / "summary.json"))
    assert fold.read_summary()["foreground_mean"] == {"Dice": 0.5}
    metrics = fold.read_summary()["metric_per_case"][0]["metrics"]
    assert metrics["1"] == {"Dice": 0.5} and math.isnan(metrics["(1, 2)"]["Dice"])


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
        ("{", "file.json can't be read: Expecting"),
        ("[]", "file.json is not nnU-Net's"),
        ('{"a": 1}', "it lacks one of a, b"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(LoMixError, match=message):
        read_json(tmp_path / "file.json", "a", "b")
    with pytest.raises(LoMixError, match="no.json isn't there: look elsewhere"):
        read_json(tmp_path / "no.json", "a", remedy="look elsewhere")
