"""The paper's rule: free softplus weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_lomix.loss.rules.base import RULES, WeightingRule


@RULES.register("softplus")
class Softplus(WeightingRule):
    """w_i = softplus(θ_i), trained jointly: minimise Σ w_i L_i (LoMix, arXiv 2510.22995, section 3.3).

    θ starts at 0, so w = ln 2. The weights are free: they do not sum to one.

    Limits: the gradient dL/dθ_i = σ(θ_i) L_i has the sign of the loss. On a non-negative loss the weights only
    fall, fastest where the loss is high, and the loss fades out; on nnU-Net's negative Dice loss they would
    grow without bound, which is why a rule never sees it.
    """

    free = True

    def __init__(self, num_maps: int):
        super().__init__(num_maps)
        self.theta = nn.Parameter(torch.zeros(num_maps))

    def raw(self) -> Tensor:
        return F.softplus(self.theta)

    def objective(self, losses: Tensor) -> Tensor:
        return (self.raw() * losses).sum()
