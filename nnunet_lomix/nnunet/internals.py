"""What nnU-Net doesn't promise to keep, and we use all the same; read in nnU-Net 2.8.0 and 2.8.1.

``MetaLogger.get_checkpoint`` gives the dictionary itself in which the logger keeps a list of values for each name, and
``plot_progress_png`` draws as many epochs as the shortest of these lists has. ``_finish`` is what nnU-Net itself calls
of batchgenerators' loaders.
"""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def set_logged(trainer: nnUNetTrainer, name: str, values: list[Any]) -> None:
    """Make a list in a trainer's logger, with a value for each epoch that has ended; a new name is then known."""
    trainer.logger.get_checkpoint()[name] = values


def end_data_loaders(trainer: nnUNetTrainer) -> None:
    """End a trainer's processes that load data, as ``on_train_end`` does; else they complain once it has ended."""
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):  # it has processes
            with contextlib.redirect_stdout(io.StringIO()):
                loader._finish()


def draw_progress(log: Mapping[str, Any], folder: Path) -> None:
    """Draw nnU-Net's progress.png from the log in a checkpoint; none if it isn't as nnU-Net writes it."""
    logger = LocalLogger()
    with matplotlib.rc_context():  # nnU-Net's plot changes matplotlib's global settings
        try:
            logger.load_checkpoint(log)
            logger.plot_progress_png(str(folder))
        except (AttributeError, KeyError, TypeError, ValueError):
            plt.close()
