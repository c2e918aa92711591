"""Schedules: all maps but ``z_0`` fade in or out over the training."""

from torch import Tensor

from nnunet_lomix.rules.barrier import Barrier
from nnunet_lomix.rules.base import RULES, z_0_alone


@RULES.register("fade_out")
class FadeOut(Barrier):
    """w = (1 − t) w_barrier + t e_0, t from 0 to 1 over the training: help at the start, then ``z_0`` alone."""

    def weights(self) -> Tensor:
        w = super().weights()
        return w + self.progress * (z_0_alone(w) - w)


@RULES.register("fade_in")
class FadeIn(Barrier):
    """w = t w_barrier + (1 − t) e_0, t from 0 to 1 over the training: ``z_0`` first, then the mixtures."""

    def weights(self) -> Tensor:
        w = super().weights()
        return w + (1 - self.progress) * (z_0_alone(w) - w)
