"""Schedules: all maps but ``z_0`` fade in or out over the training."""

import torch
from torch import Tensor

from nnunet_lomix.loss import RULES
from nnunet_lomix.loss.rules import Barrier
from nnunet_lomix.trainers import nnUNetTrainerLoMix


class Fading(Barrier):
    """The weights of the rule ``barrier``, on the way from or to all the weight on ``z_0``.

    Attributes:
        progress: how much of the training is over, 0 to 1; set by the trainer.
    """

    def __init__(self, num_maps: int, share: float):
        super().__init__(num_maps, share)
        self.progress = 0.0

    def towards_z_0(self, t: float) -> Tensor:
        """(1 − t) w_barrier + t e_0, ``(num_maps,)``."""
        w = super().weights()
        e_0 = torch.zeros_like(w)
        e_0[0] = 1
        return w + t * (e_0 - w)


@RULES.register("fade_out")
class FadeOut(Fading):
    """w = (1 − t) w_barrier + t e_0, t from 0 to 1 over the training: help at the start, then ``z_0`` alone."""

    def weights(self) -> Tensor:
        return self.towards_z_0(self.progress)


@RULES.register("fade_in")
class FadeIn(Fading):
    """w = t w_barrier + (1 − t) e_0, t from 0 to 1 over the training: ``z_0`` first, then the mixtures."""

    def weights(self) -> Tensor:
        return self.towards_z_0(1 - self.progress)


class nnUNetTrainerLoMixFading(nnUNetTrainerLoMix):
    """LoMix by one of the rules of this module, which it tells how much of the training is over."""

    rule = "fade_out"
    anchor = "z_0"

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.loss.rule.progress = self.current_epoch / self.num_epochs
