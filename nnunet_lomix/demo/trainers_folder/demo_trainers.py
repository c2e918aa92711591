"""The two trainers of the demo. A folder for ``nnUNet_extTrainer``: only trainers may be put into it."""

import os
import random

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_lomix import trainers
from nnunet_lomix.files import replacing


def seed_everything(seed: int):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Short:
    """Few and short epochs on one core: the same first network, the same batches for every trainer."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ["NNUNET_LOMIX_DEMO_EPOCHS"])
        self.num_iterations_per_epoch = int(os.environ["NNUNET_LOMIX_DEMO_ITERATIONS"])
        self.num_val_iterations_per_epoch = 5
        self.save_every = 1
        torch.set_num_threads(1)
        seed_everything(0)

    def on_train_epoch_start(self):
        # each epoch by itself: a training that goes on sees the batches of one that was never interrupted
        seed_everything(1 + self.current_epoch)
        super().on_train_epoch_start()

    def save_checkpoint(self, filename: str):
        # an interrupted demo goes on from this file
        with replacing(filename) as temporary:
            super().save_checkpoint(str(temporary))

    def perform_actual_validation(self, save_probabilities: bool = False):
        """Left out: the demo predicts the held-out cases."""


class nnUNetTrainerDemo(Short, nnUNetTrainer):
    pass


class nnUNetTrainerLoMixDemo(Short, trainers.nnUNetTrainerLoMix):
    pass
