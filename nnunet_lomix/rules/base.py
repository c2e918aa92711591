"""The interface of a weighting rule."""

import torch
from torch import Tensor, nn

from nnunet_lomix.registry import Registry

RULES = Registry("weighting rule")


class WeightingRule(nn.Module):
    """Effective weights of the maps, with a guaranteed share for ``z_0``.

    The effective weights are ``share · e_0 + (1 - share) · v / Σ v``: they sum to one, as nnU-Net's learning rate and
    gradient clipping assume, and ``z_0``, the only map that inference uses, keeps at least ``share`` of the weight, so
    it can't starve. A subclass gives ``v``, in :meth:`raw`, how it starts, in :meth:`begin`, and how it is learned, in
    :meth:`objective`.

    Attributes:
        begun: whether :meth:`begin` has been called; part of the state.

    Args:
        num_maps: number of maps, the map ``z_0`` first.
        share: guaranteed share of ``z_0``, 0 to 1.

    Raises:
        ValueError: ``share`` is not in [0, 1].
    """

    def __init__(self, num_maps: int, share: float):
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"the share of z_0 must be between 0 and 1, got {share}")
        self.num_maps = num_maps
        self.share = share
        self.begun = False

    def get_extra_state(self) -> dict:
        return {"begun": self.begun}

    def set_extra_state(self, state: dict):
        self.begun = state["begun"]

    def begin(self, losses: Tensor):
        """Called once, before the first training step; a rule may set its weights by the losses of that step.

        Args:
            losses: as for :meth:`objective`.
        """

    def raw(self) -> Tensor:
        """Non-negative relative weights v, ``(num_maps,)``."""
        raise NotImplementedError

    def objective(self, losses: Tensor) -> Tensor | None:
        """Scalar that the parameters of the rule minimise, or None if it has none.

        Args:
            losses: ``(num_maps,)``, detached and *non-negative*: nnU-Net's Dice loss is negative, and on it a rule
                would raise the weights of good maps without bound.
        """
        return None

    def weights(self) -> Tensor:
        """Effective weights, ``(num_maps,)``."""
        v = self.raw()
        z_0 = torch.zeros_like(v)
        z_0[0] = self.share
        return z_0 + (1 - self.share) * v / v.sum()
