"""The paper's own network, PVT-V2-B2 and EMCAD, in place of nnU-Net's, with the paper's optimiser; for 2d alone.

Planning, data, augmentation, validation and prediction stay nnU-Net's. Each trainer is :class:`EMCADTrainer` and one
that brings the loss.
"""

from functools import wraps
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.loss.criterion import Criterion
from nnunet_lomix.loss.lomix import FinestOutput
from nnunet_lomix.networks.alignment import output_strides
from nnunet_lomix.trainers.base import BaseTrainer, ending_with_a_sentence
from nnunet_lomix.trainers.baselines import (
    PAPER_TERMS,
    nnUNetTrainerAdditiveMix,
    nnUNetTrainerEqualDeepSupervision,
    nnUNetTrainerLoMixPaper,
)
from nnunet_lomix.trainers.lomix import nnUNetTrainerLoMix


class EMCADTrainer(BaseTrainer):
    """Builds the network and the optimiser of the paper; to be named before a trainer that brings a loss.

    A training that starts anew gives the encoder pretrained weights if they are at hand, and its log says whether.
    """

    _continues = False  # from a checkpoint, whose weights replace all others

    @wraps(nnUNetTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.initial_lr = self.weight_decay = 1e-4

    def check(self, configuration: ConfigurationManager) -> None:
        super().check(configuration)
        size = configuration.patch_size
        if len(size) != 2:
            patch = " x ".join(map(str, size))
            raise LoMixError(
                f"The EMCAD network is 2D, but this configuration has patches of {patch}: train the configuration 2d "
                "with it, or this one with nnUNetTrainerLoMix."
            )

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network with random weights; nnU-Net calls this to predict, too."""
        # imports timm, which the look-up of the other trainers doesn't need
        from nnunet_lomix.networks.emcad import EMCADNetwork

        return EMCADNetwork(num_input_channels, num_output_channels, enable_deep_supervision)

    @ending_with_a_sentence()
    def initialize(self) -> None:
        super().initialize()
        if not self._continues:
            from nnunet_lomix.networks.pvt import load_pretrained

            network = self.network.module if self.is_ddp else self.network
            self.print_to_log_file(load_pretrained(network.encoder))

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        self._continues = True
        super().load_checkpoint(filename_or_checkpoint)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        constant = PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=0)
        return optimizer, constant

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        if not self.enable_deep_supervision:
            return None
        strides = output_strides(self.configuration_manager.patch_size)
        return [[1 / stride for stride in axes] for axes in strides]


class nnUNetTrainerEMCAD(EMCADTrainer):
    """The paper's network, PVT-V2-B2 and EMCAD, and its AdamW, with nnU-Net's deep supervision; 2d only."""


class nnUNetTrainerEMCADSingleOutput(EMCADTrainer, nnUNetTrainerNoDeepSupervision):
    """The paper's network, supervised at its finest output alone, by 0.3 CE + 0.7 (1 − Dice); 2d only."""

    def _build_loss(self) -> nn.Module:
        labels = self.label_manager
        return FinestOutput(Criterion(labels.has_regions, labels.ignore_label, ddp=self.is_ddp, **PAPER_TERMS))


class nnUNetTrainerEMCADLoMix(EMCADTrainer, nnUNetTrainerLoMix):
    """The paper's network with the loss of nnUNetTrainerLoMix; 2d only."""


class nnUNetTrainerEMCADLoMixPaper(EMCADTrainer, nnUNetTrainerLoMixPaper):
    """The paper's network, optimiser and rule, free softplus weights on 0.3 CE + 0.7 (1 − Dice); 2d only."""


class nnUNetTrainerEMCADAdditiveMix(EMCADTrainer, nnUNetTrainerAdditiveMix):
    """The paper's network with the maps of nnUNetTrainerAdditiveMix, and its 0.3 CE + 0.7 (1 − Dice); 2d only."""

    weight_ce, weight_dice, paper_dice = PAPER_TERMS.values()


class nnUNetTrainerEMCADEqualDeepSupervision(EMCADTrainer, nnUNetTrainerEqualDeepSupervision):
    """The paper's network with the maps of nnUNetTrainerEqualDeepSupervision, 0.3 CE + 0.7 (1 − Dice); 2d only."""

    weight_ce, weight_dice, paper_dice = PAPER_TERMS.values()
