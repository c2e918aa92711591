"""Equal, fixed weights."""

import torch
from torch import Tensor

from nnunet_lomix.loss.rules.base import RULES, WeightingRule


@RULES.register("equal")
class Equal(WeightingRule):
    """v_i = 1: every map counts the same, nothing is learned (paper, table of baselines)."""

    ones: Tensor

    def __init__(self, num_maps: int):
        super().__init__(num_maps)
        self.register_buffer("ones", torch.ones(num_maps), persistent=False)

    def raw(self) -> Tensor:
        return self.ones
