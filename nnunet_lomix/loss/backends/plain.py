"""The reference: any operator, map by map, with PyTorch's own gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_lomix.loss.backends.base import BACKENDS, Case
from nnunet_lomix.loss.criterion import Target

MOST_VALUES = 2**26  # of all maps together: their graph takes about a gigabyte
VALUES_OF_CPU = 2**18  # of a map in a slab where that is too much: hardly slower than larger slabs


@BACKENDS.register("plain")
class Plain:
    """Memory: 3 to 4 tensors of the size of a slab for each map."""

    priority = 0

    def __init__(self, case: Case):
        self.case = case

    @staticmethod
    def unsupported(case: Case) -> str | None:
        return None

    @staticmethod
    def suits(case: Case) -> bool:
        return True

    def pixels_at_once(self, batch: int, pixels: int, finest: int) -> int:
        values = batch * self.case.num_classes
        if values * pixels * len(self.case.maps) <= MOST_VALUES:
            return pixels
        return (VALUES_OF_CPU if self.case.device.type == "cpu" else MOST_VALUES // len(self.case.maps)) // values

    def __call__(self, scales: Sequence[Tensor], target: Target) -> Tensor:
        maps = (self.case.operators[m.operator](scales, m.scales) for m in self.case.maps)
        return torch.stack([self.case.criterion.pixel_sums(logits, target) for logits in maps])
