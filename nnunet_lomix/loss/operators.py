"""The operators that mix the logits of a subset of scales into a mutant (paper, section 3.2).

An operator is a module ``operator(num_classes, num_scales)`` that maps a list of ``num_scales`` tensors
``(B, C, N)``, the logits at full resolution with the pixels flattened, to one tensor ``(B, C, N)``. It must
act on each pixel by itself, and must not draw random numbers: so a training has the same random state with and
without it.

A new operator is one class with one registration::

    @OPERATORS.register("median")
    class Median(ParameterFree): ...

Concat and fusion start as the *mean* of the scales. A random start (the reference code) makes a mutant whose
gradient pushes the shared decoder in random directions until the convolution has been learned; the sum would start
at |c| times the logits, over-confident. The mean is as calibrated as the outputs that it mixes, and it sends each
scale the same gradient, 1/|c|. Both operators leave the mean with the first step, in different directions.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nnunet_lomix.loss.registry import Registry

OPERATORS: Registry[Callable[[int, int], nn.Module]] = Registry("operator")


class Original(nn.Module):
    """The identity: an original map is its only scale."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        return scales[0]


def convolve(weight: Tensor, z: Tensor) -> Tensor:
    """1×1 convolution of ``(B, i, N)`` by ``(o, i)``. ``weight @ z`` would transpose z, and take ten times as long."""
    return torch.bmm(weight.expand(len(z), -1, -1), z)


class ParameterFree(nn.Module):
    """Base of the operators without parameters."""

    def __init__(self, num_classes: int, num_scales: int):
        super().__init__()


@OPERATORS.register("add")
class Add(ParameterFree):
    """Σ ẑ_j."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        return sum(scales[1:], scales[0])


@OPERATORS.register("multiply")
class Multiply(ParameterFree):
    """Π ẑ_j, element by element on the logits."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        return math.prod(scales[1:], start=scales[0])


@OPERATORS.register("concat")
class Concat(nn.Module):
    """1×1 convolution (C·|c| → C, with bias) of the scales stacked on channels; starts as their mean."""

    def __init__(self, num_classes: int, num_scales: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(num_classes).repeat(1, num_scales) / num_scales)
        self.bias = nn.Parameter(torch.zeros(num_classes, 1))

    def forward(self, scales: list[Tensor]) -> Tensor:
        return convolve(self.weight, torch.cat(scales, 1)) + self.bias


@OPERATORS.register("fusion")
class Fusion(nn.Module):
    """Σ a_j ẑ_j with a = softmax over j of s_j(ẑ_j), per pixel; s_j a 1×1 convolution C → 1 with bias.

    The scores start at zero, so the mutant starts as the mean of the scales.
    """

    def __init__(self, num_classes: int, num_scales: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_scales, 1, num_classes))
        self.bias = nn.Parameter(torch.zeros(num_scales))

    def forward(self, scales: list[Tensor]) -> Tensor:
        scores = torch.cat([convolve(w, z) for w, z in zip(self.weight, scales, strict=True)], 1) + self.bias[:, None]
        weighted = [a[:, None] * z for a, z in zip(scores.softmax(1).unbind(1), scales, strict=True)]
        return sum(weighted[1:], weighted[0])


@OPERATORS.register("subtract")
class Subtract(ParameterFree):
    """The finest of the scales minus all others."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        return scales[0] - sum(scales[2:], scales[1])


@OPERATORS.register("average")
class Average(ParameterFree):
    """Mean of the scales."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        return sum(scales[1:], scales[0]) / len(scales)


@OPERATORS.register("max")
class Max(ParameterFree):
    """The greatest of the scales, element by element."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        return torch.stack(scales).amax(0)
