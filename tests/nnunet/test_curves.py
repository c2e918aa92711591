"""Learning curves, against the log that nnU-Net itself writes into checkpoints."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunet_lomix.nnunet.checkpoints import CheckpointError
from nnunet_lomix.nnunet.curves import CURVE_COLUMNS, EPOCH_COLUMNS, read_all_curves, read_curves
from nnunet_lomix.nnunet.results import FoldFolder, ModelFolder

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


def test_without_a_checkpoint_there_are_no_epochs(tmp_path):
    curves = read_curves(FoldFolder(tmp_path))
    assert curves.empty and list(curves) == EPOCH_COLUMNS
