"""Softplus weights that sum to one."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_lomix.loss import RULES, WeightingRule


@RULES.register("normalised")
class Normalised(WeightingRule):
    """v_i = softplus(θ_i), with θ minimising Σ v_i L_i / Σ v_i.

    The paper's weights, only divided by their sum. θ starts at 0: equal weights.

    Limits: there is no equilibrium but all the weight on the map with the lowest loss. The gradient
    σ(θ_i) (L_i − L̄) / Σ v, with L̄ the weighted mean, raises every map that is better than the mean, forever.
    """

    def __init__(self, num_maps: int, share: float):
        super().__init__(num_maps, share)
        self.theta = nn.Parameter(torch.zeros(num_maps))

    def raw(self) -> Tensor:
        return F.softplus(self.theta)

    def objective(self, losses: Tensor) -> Tensor:
        v = self.raw()
        return (v * losses).sum() / v.sum()
