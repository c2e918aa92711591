"""Learning curves, against the log that nnU-Net itself writes into checkpoints."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.curves import CURVE_COLUMNS, EPOCH_COLUMNS, read_all_curves, read_curves
from nnunet_lomix.nnunet.results import FoldFolder, ModelFolder

from .test_checkpoints import a_checkpoint


def log_epochs(epochs: int) -> dict:
    """What nnU-Net's own logger puts into a checkpoint after some epochs, up to three; the next one has started."""
    logger = LocalLogger()
    # a class without a voxel in any patch has no Dice
    dice = [[np.float64(0.5), np.float64("nan")], [np.float64("nan")] * 2, [0.25, 0.75]]
    means = [np.float64(0.5), np.float64("nan"), 0.5]
    losses = [np.float32(0.5), np.float32(-0.25), np.float32(-0.5)]
    starts, ends = [100.0, 200.0, 1000.0, 2000.0], [150.0, 275.5, 1100.0]
    for epoch in range(epochs):
        logger.log("epoch_start_timestamps", starts[epoch], epoch)
        logger.log("train_losses", losses[epoch], epoch)
        logger.log("dice_per_class_or_region", dice[epoch], epoch)
        logger.log("mean_fg_dice", means[epoch], epoch)
        logger.log("epoch_end_timestamps", ends[epoch], epoch)
    logger.log("epoch_start_timestamps", starts[epochs], epochs)
    return logger.get_checkpoint()


def save(folder: Path, name: str, log: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(a_checkpoint(logging=log), folder / name)


def test_curves_are_nnunets_log_of_the_epochs_that_have_ended(tmp_path):
    save(tmp_path, "checkpoint_latest.pth", log_epochs(3))
    rows = [(0, 0.5, 0.5, 50.0), (1, math.nan, -0.25, 75.5), (2, 0.5, -0.5, 100.0)]
    expected = pd.DataFrame(rows, columns=["epoch", "pseudo_dice", "train_loss", "seconds"])
    pd.testing.assert_frame_equal(read_curves(FoldFolder(tmp_path)), expected)


@pytest.mark.parametrize("log", [3, {"train_losses": [[1], [2, 3]]}, {"mean_fg_dice": ["many"]}])
def test_a_log_that_is_none_is_refused(tmp_path, log):
    save(tmp_path, "checkpoint_final.pth", log)
    with pytest.raises(LoMixError, match="checkpoint_final.pth has a log that nnU-Net doesn't write"):
        read_curves(FoldFolder(tmp_path))


def test_curves_of_several_trainings(tmp_path):
    models = {("A", 0): ModelFolder(tmp_path / "a"), ("A", 1): ModelFolder(tmp_path / "b")}
    assert list(read_curves(FoldFolder(tmp_path))) == EPOCH_COLUMNS
    assert list(read_all_curves(models, ["0"])) == CURVE_COLUMNS
    save(tmp_path / "a" / "fold_0", "checkpoint_final.pth", log_epochs(1))
    save(tmp_path / "b" / "fold_2", "checkpoint_best.pth", log_epochs(2))
    table = read_all_curves(models, ["0", "2"])
    rows = [("A", 0, "0", 0, 0.5, 0.5, 50), ("A", 1, "2", 0, 0.5, 0.5, 50), ("A", 1, "2", 1, math.nan, -0.25, 75.5)]
    columns = ["trainer", "seed", "fold", "epoch", "pseudo_dice", "train_loss", "seconds"]
    pd.testing.assert_frame_equal(table, pd.DataFrame(rows, columns=columns), check_dtype=False)
