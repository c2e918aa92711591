"""Weights by how much a map helps ``z_0``."""

import torch
from torch import Tensor

from nnunet_lomix.rules.base import RULES, WeightingRule, update_mean


@RULES.register("alignment")
class Alignment(WeightingRule):
    """v_i = a_i / a_0, held between 0 and 1, with a_i = ⟨∇L_0, ∇L_i⟩ over the parameters of the network.

    The one-step look-ahead of architecture search (DARTS, arXiv 1806.09055) and of auxiliary tasks (Du et al.,
    arXiv 1812.02224; Auto-Lambda, arXiv 2202.03091): after a step −η Σ w_i ∇L_i the loss of ``z_0`` has changed by
    −η Σ w_i a_i, so a_i is what a unit of the weight of map i does for ``z_0``, and v_i compares it with what the
    weight would do on ``z_0`` itself. A map that works against ``z_0`` gets nothing. v_0 = 1. Where a_0 itself is not
    positive, which can only be noise, every map with a positive a_i counts fully.
    a is measured at every 10th step and averaged over about 100 steps; until then all maps are equal.

    Limits: it looks one step ahead only. Every measurement costs a backward and three forward passes, all in full
    precision: a network that only fits into memory by mixed precision may not fit.
    """

    alignment_every = 10
    momentum = 0.9

    def __init__(self, num_maps: int, share: float):
        super().__init__(num_maps, share)
        self.register_buffer("mean_alignment", torch.ones(num_maps))

    def align(self, alignment: Tensor):
        update_mean(self.mean_alignment, alignment, self.momentum, first=self.steps == 0)

    def raw(self) -> Tensor:
        tiny = torch.finfo(self.mean_alignment.dtype).tiny
        v = (self.mean_alignment / self.mean_alignment[0].clamp_min(tiny)).clamp(0, 1)
        return v.index_fill(0, torch.zeros(1, dtype=torch.long, device=v.device), 1)


@RULES.register("alignment_held_out")
class AlignmentHeldOut(Alignment):
    """The same with ∇L_0 and ∇L_i on different samples of the batch: does a map help ``z_0`` on *other* images?

    Never on the validation cases of the fold: what is selected by them can't be judged by them.
    """

    alignment_held_out = True
