"""The arms of the study, trainers ``Study<arm>``. A folder for ``nnUNet_extTrainer``; see ../study.py."""

import json
import os
import random
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerAdam
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nnunet_lomix import trainers
from nnunet_lomix.loss import DEFAULT_OPERATORS
from nnunet_lomix.trainers import lomix

LOMIX = trainers.nnUNetTrainerLoMix
FIXED = trainers.nnUNetTrainerLoMixFixedWeights
EQUAL = trainers.nnUNetTrainerEqualDeepSupervision


def adamw(trainer: nnUNetTrainer) -> tuple[Optimizer, LRScheduler]:
    """That of nnU-Net's nnUNetTrainerAdam, with a higher learning rate."""
    trainer.initial_lr = 5e-3
    return nnUNetTrainerAdam.configure_optimizers(trainer)


def sgd(trainer: nnUNetTrainer) -> tuple[Optimizer, LRScheduler]:
    """nnU-Net's SGD with a shorter memory.

    Its momentum of 0.99 is made for 250 000 steps: in a few hundred what is compared is who leaves the plateau at the
    start first. 0.9 with a tenfold learning rate takes steps of the same size, lr / (1 - momentum) = 1.
    """
    trainer.initial_lr = 0.1
    optimizer, schedule = nnUNetTrainer.configure_optimizers(trainer)
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    return optimizer, schedule


class WeightedCriterion(nnUNetTrainer):
    """nnUNetTrainer, whose criterion is weight_ce · CE + weight_dice · Dice."""

    weight_ce: float = 1
    weight_dice: float = 1

    def _build_loss(self) -> nn.Module:
        deep_supervision = super()._build_loss()
        criterion = deep_supervision.loss
        criterion.weight_ce, criterion.weight_dice = self.weight_ce, self.weight_dice
        return deep_supervision


PAPER_CRITERION = {"weight_ce": 0.3, "weight_dice": 0.7}

# name: nnU-Net's trainer, ours, or that of an extension, and what is different from it
ARMS: dict[str, tuple[type[nnUNetTrainer], dict[str, Any]]] = {
    "nnUNetTrainer": (nnUNetTrainer, {}),
    "nnUNetTrainer_again": (nnUNetTrainer, {}),  # how much is rounding, on another machine
    "nnUNetTrainer_other_batches": (nnUNetTrainer, {"other_batches": True}),  # how much is chance
    "SingleOutput": (nnUNetTrainerNoDeepSupervision, {}),
    "EqualDeepSupervision": (EQUAL, {}),
    "AdditiveMix": (trainers.nnUNetTrainerAdditiveMix, {}),
    "FixedWeights": (FIXED, {}),
    "Paper": (trainers.nnUNetTrainerLoMixPaper, {}),
    **{rule: (LOMIX, {"rule": rule}) for rule in ("equal", "barrier")},
    **{f"share_{s:.2f}": (LOMIX, {"rule": "barrier", "share": s}) for s in (0.0, 0.25, 0.75, 0.9)},
    **{f"deep_supervision_{s:.2f}": (LOMIX, {"anchor": "deep_supervision", "share": s}) for s in (0.25, 0.5, 0.75)},
    "deep_supervision_equal": (LOMIX, {"anchor": "deep_supervision", "rule": "equal"}),
    "stride_2": (LOMIX, {"anchor": "deep_supervision", "stride": 2}),  # the default
    **{
        f"without_{left_out}": (
            LOMIX,
            {"rule": "barrier", "operators": tuple(o for o in DEFAULT_OPERATORS if o != left_out)},
        )
        for left_out in DEFAULT_OPERATORS
    },
    "originals_only": (LOMIX, {"rule": "barrier", "operators": ()}),
    "K_2": (LOMIX, {"rule": "barrier", "mixed_scales": 2}),
    "K_3": (LOMIX, {"rule": "barrier", "mixed_scales": 3}),
    # the paper's free weights sum to 13 where all others sum to 1: is it the larger step that helps?
    "nnUNetTrainer_x13": (nnUNetTrainer, {"factor": 13}),
    "barrier_x13": (LOMIX, {"rule": "barrier", "factor": 13}),
    "FixedWeights_x13": (FIXED, {"factor": 13}),
    # or that they learn, or that each map costs 0.3 CE + 0.7 Dice, which halves the sum of the two?
    "Paper_fixed": (trainers.nnUNetTrainerLoMixPaper, {"rule": "equal", "factor": 13}),
    "nnUNetTrainer_paper_terms_x13": (WeightedCriterion, PAPER_CRITERION | {"factor": 13}),
    "EqualDeepSupervision_paper_terms_x13": (EQUAL, PAPER_CRITERION | {"factor": 13}),
    "barrier_more_dice": (LOMIX, {"rule": "barrier", "weight_ce": 0.6, "weight_dice": 1.4}),
    "nnUNetTrainer_x6.5": (nnUNetTrainer, {"factor": 6.5}),
    "barrier_x6.5": (LOMIX, {"rule": "barrier", "factor": 6.5}),
    "FixedWeights_x6.5": (FIXED, {"factor": 6.5}),
}


def nnunet(trainer: nnUNetTrainer, rate: float) -> tuple[Optimizer, LRScheduler]:
    """nnU-Net's own SGD at a multiple of its learning rate."""
    trainer.initial_lr *= rate
    return nnUNetTrainer.configure_optimizers(trainer)


# name: how the network's optimiser is set up; nnU-Net's own is for thousands of steps
OPTIMISERS = {
    "adamw": adamw,
    "sgd": sgd,
    "nnunet": partial(nnunet, rate=1),
    "nnunet_x2.5": partial(nnunet, rate=2.5),
    "nnunet_x6.5": partial(nnunet, rate=6.5),
}


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Short:
    """The budget of the study; the same first network and the same batches for every arm of a seed.

    Attributes:
        factor: of the whole loss.
        anchor, stride: of LoMix; an arm names others.
        other_batches: than those of the other arms.
    """

    factor: float = 1
    anchor = "z_0"
    stride = 1
    other_batches = False

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        budget = json.loads(os.environ["NNUNET_LOMIX_STUDY"])
        self.seed = budget["seed"]
        self.optimiser = budget["optimiser"]
        self.num_epochs = budget["epochs"]
        self.num_iterations_per_epoch = budget["iterations"]
        self.num_val_iterations_per_epoch = 10
        if device.type == "cpu":
            torch.set_num_threads(1)
        seed_everything(self.seed)

    def on_train_epoch_start(self) -> None:
        seed_everything(1000 * (self.seed + 1) + 500 * self.other_batches + self.current_epoch)
        super().on_train_epoch_start()

    def configure_optimizers(self) -> tuple[Optimizer, LRScheduler]:
        return OPTIMISERS[self.optimiser](self)

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        loss.register_forward_hook(lambda module, inputs, value: self.factor * value)
        return loss

    def on_epoch_end(self) -> None:
        self.logger.local_logger.plot_progress_png = lambda folder: None  # takes as long as ten steps, as does ours
        with patch.object(lomix, "plot_history"):
            super().on_epoch_end()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation of whole volumes, without mirroring: a quarter of the time."""
        self.inference_allowed_mirroring_axes = None
        super().perform_actual_validation(save_probabilities)


def __getattr__(name: str) -> type[nnUNetTrainer]:
    arm = name.removeprefix("Study")
    if arm == name or arm not in ARMS:
        raise AttributeError(name)
    base, differences = ARMS[arm]
    return type(name, (Short, base), differences)
