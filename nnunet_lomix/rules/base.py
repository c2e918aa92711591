"""The interface of a weighting rule."""

import torch
from torch import Tensor, nn

from nnunet_lomix.registry import Registry

RULES = Registry("weighting rule")


class WeightingRule(nn.Module):
    """Effective weights of the maps, with a guaranteed share for ``z_0``.

    The effective weights are ``share · e_0 + (1 - share) · v / Σ v``: they sum to one, as nnU-Net's learning rate and
    gradient clipping assume, and ``z_0``, the only map that inference uses, keeps at least ``share`` of the weight, so
    it can't starve. A subclass gives ``v``, in :meth:`raw`. It may learn v by gradient descent on :meth:`objective`,
    compute v from the losses that it is shown in :meth:`observe`, or from :meth:`align`.

    Attributes:
        steps: number of training steps observed; part of the state.
        progress: how much of the training is over, 0 to 1; set by the trainer.
        alignment_every: a number n for a rule that wants :meth:`align` to be called at every nth step, or None.
        alignment_held_out: whether the alignment is measured between different samples of the batch.

    Args:
        num_maps: number of maps, the map ``z_0`` first.
        share: guaranteed share of ``z_0``, 0 to 1.

    Raises:
        ValueError: ``share`` is not in [0, 1].
    """

    alignment_every: int | None = None
    alignment_held_out = False

    def __init__(self, num_maps: int, share: float):
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"the share of z_0 must be between 0 and 1, got {share}")
        self.num_maps = num_maps
        self.share = share
        self.steps = 0
        self.progress = 0.0

    def get_extra_state(self) -> dict:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict):
        self.steps = state["steps"]

    def observe(self, losses: Tensor):
        """Called at every training step, before its weights are used.

        Args:
            losses: ``(num_maps,)``, detached and *non-negative*: nnU-Net's Dice loss is negative, and on it a rule
                would raise the weights of good maps without bound.
        """
        self.steps += 1

    def align(self, alignment: Tensor):
        """Called before a training step if :attr:`alignment_every` says so.

        Args:
            alignment: ``(num_maps,)``, see :func:`nnunet_lomix.alignment.measure_alignment`.
        """

    def raw(self) -> Tensor:
        """Non-negative relative weights v, ``(num_maps,)``."""
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
        return self.share * z_0_alone(v) + (1 - self.share) * v / v.sum()


def update_mean(mean: Tensor, new: Tensor, momentum: float, first: bool):
    """One step of an exponential moving average, in place, which starts with the first values.

    Values that aren't finite are left out: under mixed precision some steps overflow.
    """
    new = new.where(new.isfinite(), mean)
    mean.lerp_(new, 1.0 if first else 1 - momentum)


def z_0_alone(v: Tensor) -> Tensor:
    """e_0: all the weight for ``z_0``."""
    e_0 = torch.zeros_like(v)
    e_0[0] = 1
    return e_0
