"""The arms of the study, trainers ``Study<arm>``. A folder for ``nnUNet_extTrainer``; see ../study.py."""

import json
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nnunet_lomix import trainers
from nnunet_lomix.loss import DEFAULT_OPERATORS, LoMixLoss
from nnunet_lomix.trainers import lomix

LOMIX = trainers.nnUNetTrainerLoMix
FIXED = trainers.nnUNetTrainerLoMixFixedWeights
EQUAL = trainers.nnUNetTrainerEqualDeepSupervision
PREDICTING = ("fusion", "concat")  # operators whose mutants may predict


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


# name: nnU-Net's trainer, or ours, and what is different from it
ARMS: dict[str, tuple[type[nnUNetTrainer], dict[str, Any]]] = {
    "nnUNetTrainer": (nnUNetTrainer, {}),
    "nnUNetTrainer_other_batches": (nnUNetTrainer, {"other_batches": True}),  # how much is chance
    "SingleOutput": (nnUNetTrainerNoDeepSupervision, {}),
    "EqualDeepSupervision": (EQUAL, {}),
    "AdditiveMix": (trainers.nnUNetTrainerAdditiveMix, {}),
    "FixedWeights": (FIXED, {}),
    "Paper": (trainers.nnUNetTrainerLoMixPaper, {}),
    "default": (LOMIX, {}),
    "default_equal": (LOMIX, {"rule": "equal"}),
    "default_outputs_alone": (LOMIX, {"operators": ()}),
    "default_share_0": (LOMIX, {"share": 0.0}),
    **{f"default_{operator}": (LOMIX, {"operators": (operator,)}) for operator in DEFAULT_OPERATORS},
    "default_every_pixel": (LOMIX, {"stride": 1}),
}


def nnunet(trainer: nnUNetTrainer, rate: float) -> tuple[Optimizer, LRScheduler]:
    """nnU-Net's own SGD at a multiple of its learning rate."""
    trainer.initial_lr *= rate
    return nnUNetTrainer.configure_optimizers(trainer)


# name: how the network's optimiser is set up; nnU-Net's own is for thousands of steps
OPTIMISERS = {
    "sgd": sgd,
    "nnunet": partial(nnunet, rate=1),
    "nnunet_x2.5": partial(nnunet, rate=2.5),
    "nnunet_x6.5": partial(nnunet, rate=6.5),
}


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Mixed(nn.Module):
    """A deeply supervised network with a mixture of its outputs, at full resolution, as its only output.

    Args:
        network: gives several outputs, the finest first.
        mix: from all outputs at the N pixels of the finest one, each ``(B, C, N)``, to the mixture of the same shape.
    """

    def __init__(self, network: nn.Module, mix: Callable[[list[Tensor]], Tensor]):
        super().__init__()
        self.network = network
        self.mix = mix
        self.decoder = network.decoder  # where nnU-Net switches deep supervision off and on

    def forward(self, image: Tensor) -> Tensor:
        self.decoder.deep_supervision = True
        z_0, *others = self.network(image)
        others = [F.interpolate(z, z_0.shape[2:], mode="bilinear", align_corners=False) for z in others]
        return self.mix([z.flatten(2) for z in (z_0, *others)]).view_as(z_0)


def mixtures(loss: nn.Module) -> dict[str, Callable[[list[Tensor]], Tensor]]:
    """What can be predicted with beside z_0: the trained mutants of all mixed scales, or a plain sum as the control."""
    if isinstance(loss, LoMixLoss):  # of each operator the last map mixes all
        last = {m.operator: m for m in loss.maps if m.operator in PREDICTING}
        return {name: partial(loss.operators[name], subset=m.scales) for name, m in last.items()}
    return {"z_0 + z_1": lambda scales: scales[0] + scales[1]} if isinstance(loss, DeepSupervisionWrapper) else {}


class Short:
    """The budget of the study; the same first network and the same batches for every arm of a seed.

    Attributes:
        other_batches: than those of the other arms.
    """

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

    def on_epoch_end(self) -> None:
        self.logger.local_logger.plot_progress_png = lambda folder: None  # takes as long as ten steps, as does ours
        with patch.object(lomix, "plot_history"):
            super().on_epoch_end()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation of whole volumes, without mirroring: a quarter of the time.

        Mixtures of the outputs are validated, too, each in a folder of its own below the fold's.
        """
        self.inference_allowed_mirroring_axes = None
        super().perform_actual_validation(save_probabilities)
        network, folder = self.network, self.output_folder
        for name, mix in mixtures(self.loss).items():
            self.network, self.output_folder = Mixed(network, mix), str(Path(folder, name))
            super().perform_actual_validation(save_probabilities)
        self.network, self.output_folder = network, folder


def __getattr__(name: str) -> type[nnUNetTrainer]:
    arm = name.removeprefix("Study")
    if arm == name or arm not in ARMS:
        raise AttributeError(name)
    base, differences = ARMS[arm]
    return type(name, (Short, base), differences)
