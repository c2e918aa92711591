"""Weights with a logarithmic barrier: uncertainty weighting."""

from math import log

import torch
from torch import Tensor, nn

from nnunet_lomix.loss.rules.base import RULES, WeightingRule


@RULES.register("barrier")
class Barrier(WeightingRule):
    """v_i = exp(θ_i), with θ minimising Σ (v_i L_i − β log v_i), β = ½.

    Uncertainty weighting (Kendall et al., arXiv 1705.07115, equation 7, with v = 1/σ², so that log σ = −½ log v, and
    learned, as there, on the logarithm; Liebel and Körner, arXiv 1805.06334). The barrier holds each weight near its
    optimum v_i = β / L_i: a map counts in inverse proportion to its loss. A factor common to all losses cancels when
    the weights are normalised, and, thanks to the logarithm, it changes nothing on the way there either.
    θ starts at the optimum for the first training step: in an untrained network all maps are alike, but products of
    the logits of a trained one cost much more than the rest, and equal weights would drown ``z_0`` in their gradients.
    Losses count as at least 0.01, so that no map takes all.

    Limits: the rule prefers maps with a low loss, not maps that help ``z_0``.
    """

    beta = 0.5
    least_loss = 0.01

    def __init__(self, num_maps: int):
        super().__init__(num_maps)
        self.theta = nn.Parameter(torch.zeros(num_maps))

    @torch.no_grad()
    def observe(self, losses: Tensor) -> None:
        known = losses.nan_to_num(nan=1.0, posinf=1e4).clamp_min(self.least_loss)
        start = log(self.beta) - known.log()
        self.theta.copy_(torch.where(self.steps == 0, start, self.theta))  # decided on the device, no host waits
        super().observe(losses)

    def raw(self) -> Tensor:
        return self.theta.exp()

    def objective(self, losses: Tensor) -> Tensor:
        return torch.sub(self.raw() @ losses.clamp_min(self.least_loss), self.theta.sum(), alpha=self.beta)
