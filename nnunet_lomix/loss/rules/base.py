"""The interface of a weighting rule."""

from typing import Any

import torch
from torch import Tensor, nn

from nnunet_lomix.loss.registry import Registry


class WeightingRule(nn.Module):
    """Effective weights of the maps, with a guaranteed share for ``z_0``.

    The effective weights are ``share · e_0 + (1 - share) · v / Σ v``: they sum to one, as nnU-Net's learning rate and
    gradient clipping assume, and ``z_0``, the only map that inference uses, keeps at least ``share`` of the weight, so
    it can't starve. A subclass gives ``v``, in :meth:`raw`. It may learn v by gradient descent on :meth:`objective`,
    or compute v from the losses that it is shown in :meth:`observe`.

    Attributes:
        steps: number of training steps observed; part of the state.

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
        self.steps = 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def observe(self, losses: Tensor) -> None:
        """Called at every training step, before its weights are used.

        Args:
            losses: ``(num_maps,)``, detached and *non-negative*: nnU-Net's Dice loss is negative, and on it a rule
                would raise the weights of good maps without bound.
        """
        self.steps += 1

    def raw(self) -> Tensor:
        """Non-negative relative weights v, ``(num_maps,)``, on the device of the module.

        In the order of :attr:`LoMixLoss.maps`: the originals, finest first, then operator by operator. Constants are
        buffers, so that they move with the module; with ``persistent=False`` checkpoints don't have them.
        """
        raise NotImplementedError

    def objective(self, losses: Tensor) -> Tensor | None:
        """Scalar that the parameters of the rule minimise, or None if it has none.

        Args:
            losses: as for :meth:`observe`.
        """
        return None

    def weights(self) -> Tensor:
        """Effective weights, ``(num_maps,)``."""
        v = self.raw()
        z_0_alone = torch.zeros_like(v)
        z_0_alone[:1].fill_(1)  # z_0_alone[0] = 1 would copy the number from the host
        return self.share * z_0_alone + (1 - self.share) * v / v.sum()


RULES: Registry[type[WeightingRule]] = Registry("weighting rule")
