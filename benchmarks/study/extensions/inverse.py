"""A softmax over inverse losses."""

import torch
from torch import Tensor

from extensions.moving_average import update_mean
from nnunet_lomix.loss import RULES, WeightingRule


@RULES.register("inverse")
class Inverse(WeightingRule):
    """v = softmax(s / T), s_i = (1 / L_i) / mean(1 / L), T = 1; nothing is learned by gradient descent.

    UW-SO (Kirchdorfer et al., arXiv 2408.07985, equation 8) puts the optimum of uncertainty weighting, 1 / L_i, into
    a softmax with temperature. The division by the mean is ours: T means the same whatever the scale of the losses.
    The losses are an exponential moving average over about 100 steps, at least 0.01.

    Limits: the rule prefers maps with a low loss, not maps that help ``z_0``.
    """

    temperature = 1.0
    momentum = 0.99
    least_loss = 0.01
    mean_losses: Tensor

    def __init__(self, num_maps: int, share: float):
        super().__init__(num_maps, share)
        self.register_buffer("mean_losses", torch.ones(num_maps))

    def observe(self, losses: Tensor) -> None:
        update_mean(self.mean_losses, losses.clamp_min(self.least_loss), self.momentum, first=self.steps == 0)
        super().observe(losses)

    def raw(self) -> Tensor:
        inverse = 1 / self.mean_losses
        return (inverse / inverse.mean() / self.temperature).softmax(0)
