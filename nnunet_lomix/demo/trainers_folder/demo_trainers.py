"""The two trainers of the demo. A folder for ``nnUNet_extTrainer``: only trainers may be put into it."""

import json
import os
import random
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_lomix.files import replacing
from nnunet_lomix.trainers import nnUNetTrainerLoMix


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Short(nnUNetTrainer):
    """Few and short epochs on one core: the same first network, the same batches for every trainer.

    The environment has their number, and the name of the file that tells the demo how many have ended.
    """

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.budget = json.loads(os.environ["NNUNET_LOMIX_DEMO"])
        self.num_epochs = self.budget["epochs"]
        self.num_iterations_per_epoch = self.budget["iterations"]
        self.num_val_iterations_per_epoch = 5
        self.save_every = 1
        torch.set_num_threads(1)
        seed_everything(0)

    def on_train_epoch_start(self) -> None:
        # each epoch by itself: a training that goes on sees the batches of one that was never interrupted
        seed_everything(1 + self.current_epoch)
        super().on_train_epoch_start()

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        with replacing(Path(self.output_folder, self.budget["finished_epochs"])) as temporary:
            temporary.write_text(str(self.current_epoch))

    def save_checkpoint(self, filename: str) -> None:
        # an interrupted demo goes on from this file
        with replacing(filename) as temporary:
            super().save_checkpoint(str(temporary))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Left out: the demo predicts the held-out cases."""


class nnUNetTrainerDemo(Short):
    """nnU-Net's own trainer."""


class nnUNetTrainerLoMixDemo(Short, nnUNetTrainerLoMix):
    """LoMix, with the same budget."""
