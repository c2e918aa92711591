"""The interface of a weighting rule."""

import torch
from torch import Tensor, nn

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
        """Called at every training step, before its weights are used; it must not write what :meth:`raw` keeps.

        Args:
            losses: ``(num_maps,)``, detached and *non-negative*: nnU-Net's Dice loss is negative, and on it a rule
                would raise the weights of good maps without bound.
        """
        self.steps += 1

    def raw(self) -> Tensor:
        """Non-negative relative weights v, ``(num_maps,)``, on the device of the module.

        Constants are buffers, so that they move with the module; with ``persistent=False`` checkpoints don't have them.
        """
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
