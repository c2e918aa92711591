"""Seeded short trainings that two CPU cores can finish: ``<trainer>_short_seed<n>``, for any trainer and seed.

A folder for ``nnUNet_extTrainer``; see ../short_training.py.
"""

import re

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunet_lomix import trainers
from nnunet_lomix.loss import RULES
from nnunet_lomix.loss.rules import Softplus

BATCH_SIZE = {2: 16, 3: 2}
PATCH_SIZE = {2: [56, 40], 3: [32, 40, 32]}  # in 2D that of the plans for the Hippocampus
ITERATIONS_PER_EPOCH = {2: 60, 3: 20}
VALIDATION_ITERATIONS = {2: 20, 3: 8}


class Short:
    """10 epochs of few iterations, small batches, one thread, fixed seeds."""

    seed = 0

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        dim = len(self.configuration_manager.patch_size)
        self.configuration_manager.configuration["batch_size"] = BATCH_SIZE[dim]
        self.configuration_manager.configuration["patch_size"] = PATCH_SIZE[dim]
        self.num_iterations_per_epoch = ITERATIONS_PER_EPOCH[dim]
        self.num_val_iterations_per_epoch = VALIDATION_ITERATIONS[dim]
        self.num_epochs = 10
        torch.set_num_threads(1)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """On whole volumes only in 2D: in 3D it would take as long as the training."""
        if len(self.configuration_manager.patch_size) == 2:
            super().perform_actual_validation(save_probabilities)


@RULES.register("naive softplus")
class NaiveSoftplus(Softplus):
    """The paper's rule on nnU-Net's signed loss: the naive port, which explodes."""

    def objective(self, losses: Tensor) -> Tensor:
        return super().objective(losses - 1)


class nnUNetTrainerLoMixNaive(trainers.nnUNetTrainerLoMix):
    """Free softplus weights, trained by nnU-Net's own optimiser settings on nnU-Net's negative loss."""

    rule = "naive softplus"
    share = 0.0

    def configure_loss_optimizer(self) -> torch.optim.Optimizer:
        parameters = self.loss.parameters()
        return torch.optim.SGD(parameters, 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)


BASES = {t.__name__: t for t in (nnUNetTrainer, nnUNetTrainerLoMixNaive, *trainers.TRAINERS)}


def __getattr__(name: str) -> type[nnUNetTrainer]:
    match = re.fullmatch(r"(\w+)_short_seed(\d+)", name)
    if not match or match[1] not in BASES:
        raise AttributeError(name)
    return type(name, (Short, BASES[match[1]]), {"seed": int(match[2])})
