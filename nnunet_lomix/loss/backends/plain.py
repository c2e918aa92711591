"""The reference: any operator, map by map, with PyTorch's own gradients."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunet_lomix.loss.criterion import Criterion, Target
from nnunet_lomix.loss.maps import Map

MOST_VALUES = 2**26  # of all maps together: their graph takes about a gigabyte
VALUES_OF_CPU = 2**18  # of a map in a slab where that is too much: hardly slower than larger slabs


class Case(NamedTuple):
    """What a backend computes: the maps of a :class:`~nnunet_lomix.loss.LoMixLoss`, on a device."""

    maps: Sequence[Map]
    operators: Mapping[str, nn.Module]
    criterion: Criterion
    num_classes: int
    num_scales: int
    device: torch.device
    dtype: torch.dtype


class Plain:
    """Memory: 3 to 4 tensors of the size of a slab for each map."""

    def __init__(self, case: Case):
        self.case = case

    @staticmethod
    def unsupported(case: Case) -> None:
        """Nothing is."""

    def pixels_at_once(self, batch: int, pixels: int, finest: int) -> int:
        values = batch * self.case.num_classes
        if values * pixels * len(self.case.maps) <= MOST_VALUES:
            return pixels
        return (VALUES_OF_CPU if self.case.device.type == "cpu" else MOST_VALUES // len(self.case.maps)) // values

    def __call__(self, scales: Sequence[Tensor], target: Target) -> Tensor:
        maps = (self.case.operators[m.operator](scales, m.scales) for m in self.case.maps)
        return torch.stack([self.case.criterion.pixel_sums(logits, target) for logits in maps])
