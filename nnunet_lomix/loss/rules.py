"""How much each map counts. A new rule is a class with one method and one registration::

@RULES.register("finest")
class Finest(WeightingRule):
    def raw(self):
        return torch.eye(self.num_maps, device=self.steps.device)[0]
"""

from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_lomix.loss.registry import Registry


class WeightingRule(nn.Module):
    """Weights of the maps, ``v / Σ v``: they sum to one, as nnU-Net's learning rate and gradient clipping assume.

    A subclass gives ``v``, in :meth:`raw`. It may learn v by gradient descent on :meth:`objective`, or compute v from
    the losses that it is shown in :meth:`observe`.

    Attributes:
        steps: ``()``, int64, number of training steps observed; a buffer, so part of the state.
        free: whether the weights don't sum to one, so that beside them an anchor would have no certain share.

    Args:
        num_maps: number of maps, in the order of :attr:`LoMixLoss.maps`: the originals, finest first, then operator by
            operator.
    """

    steps: Tensor
    free = False

    def __init__(self, num_maps: int):
        super().__init__()
        self.num_maps = num_maps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def observe(self, losses: Tensor) -> None:
        """Called at every training step, before its weights are used; what :meth:`raw` has returned must not change.

        Args:
            losses: ``(num_maps,)``, detached and *non-negative*: nnU-Net's Dice loss is negative, and on it a rule
                would raise the weights of good maps without bound.
        """
        self.steps += 1

    def raw(self) -> Tensor:
        """Non-negative relative weights v, ``(num_maps,)``, on the device of the module."""
        raise NotImplementedError

    def objective(self, losses: Tensor) -> Tensor | None:
        """Scalar that the parameters of the rule minimise, or None if it has none.

        Args:
            losses: as for :meth:`observe`.
        """
        return None

    def weights(self) -> Tensor:
        """Weights of the maps, ``(num_maps,)``."""
        v = self.raw()
        return v if self.free else v / v.sum()


RULES: Registry[type[WeightingRule]] = Registry("weighting rule")


@RULES.register("equal")
class Equal(WeightingRule):
    """v_i = 1: every map counts the same, nothing is learned (paper, table of baselines)."""

    ones: Tensor

    def __init__(self, num_maps: int):
        super().__init__(num_maps)
        self.register_buffer("ones", torch.ones(num_maps), persistent=False)

    def raw(self) -> Tensor:
        return self.ones


@RULES.register("barrier")
class Barrier(WeightingRule):
    """v_i = exp(θ_i), with θ minimising Σ (v_i L_i − β log v_i), β = ½: uncertainty weighting.

    Kendall et al., arXiv 1705.07115, equation 7, with v = 1/σ², so that log σ = −½ log v, and learned, as there, on the
    logarithm (also Liebel and Körner, arXiv 1805.06334). The barrier holds each weight near its optimum v_i = β / L_i:
    a map counts in inverse proportion to its loss. A factor common to all losses cancels when the weights are
    normalised, and, thanks to the logarithm, it changes nothing on the way there either. θ starts at the optimum for
    the first training step: in an untrained network all maps are alike, but products of the logits of a trained one
    cost much more than the rest, and equal weights would drown ``z_0`` in their gradients. Losses count as at least
    0.01, so that no map takes all.

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
        # decided on the device, no host waits; averages of a network's state may have a θ and still no steps
        has_begun = (self.steps > 0) | self.theta.any()
        self.theta.copy_(torch.where(has_begun, self.theta, start))
        super().observe(losses)

    def raw(self) -> Tensor:
        return self.theta.exp()

    def objective(self, losses: Tensor) -> Tensor:
        return torch.sub(self.raw() @ losses.clamp_min(self.least_loss), self.theta.sum(), alpha=self.beta)


@RULES.register("softplus")
class Softplus(WeightingRule):
    """w_i = softplus(θ_i), trained jointly: minimise Σ w_i L_i (LoMix, arXiv 2510.22995, section 3.3).

    θ starts at 0, so w = ln 2. The weights are free: they do not sum to one.

    Limits: the gradient dL/dθ_i = σ(θ_i) L_i has the sign of the loss. On a non-negative loss the weights only fall,
    fastest where the loss is high, and the loss fades out; on nnU-Net's negative Dice loss they would grow without
    bound, which is why a rule never sees it.
    """

    free = True

    def __init__(self, num_maps: int):
        super().__init__(num_maps)
        self.theta = nn.Parameter(torch.zeros(num_maps))

    def raw(self) -> Tensor:
        return F.softplus(self.theta)

    def objective(self, losses: Tensor) -> Tensor:
        return (self.raw() * losses).sum()
