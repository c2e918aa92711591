"""A user's own folder of trainers: the shortest trainings that nnU-Net can do."""

import os

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_lomix.trainers import nnUNetTrainerLoMix


class Tiny:
    """Two training steps an epoch; the environment has the number of epochs, and whether to validate at the end."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.configuration_manager.configuration["batch_size"] = 2
        self.num_epochs = int(os.environ.get("TINY_EPOCHS", 1))
        self.num_iterations_per_epoch = 2
        self.num_val_iterations_per_epoch = 1
        torch.set_num_threads(1)

    def perform_actual_validation(self, save_probabilities: bool = False):
        if os.environ.get("TINY_VALIDATION") != "0":
            super().perform_actual_validation(save_probabilities)


class nnUNetTrainerTiny(Tiny, nnUNetTrainer):
    pass


class nnUNetTrainerLoMixTiny(Tiny, nnUNetTrainerLoMix):
    pass


class nnUNetTrainerLoMixTinyUnknownOperator(nnUNetTrainerLoMixTiny):
    operators = ("add", "divide")
