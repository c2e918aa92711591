"""The operators that mix the logits of a subset of scales into a mutant (paper, section 3.2).

An operator is one module for all of its subsets. A new one is a class with one method and one registration::

    @OPERATORS.register("median")
    class Median(Operator):
        def mix(self, scales, number):
            return torch.stack(scales).median(0).values

Concat and fusion start as the *mean* of the scales. A random start (the reference code) makes a mutant whose
gradient pushes the shared decoder in random directions until the convolution has been learned; the sum would start
at |c| times the logits, over-confident. The mean is as calibrated as the outputs that it mixes, and it sends each
scale the same gradient, 1/|c|. Both operators leave the mean with the first step, in different directions.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from nnunet_lomix.loss.registry import Registry

Subset = tuple[int, ...]


class Operator(nn.Module):
    """Makes a mutant of each of its subsets of the scales.

    It acts on each pixel by itself and draws no random numbers, so a training run has the same random state with and
    without it.

    Args:
        num_classes: C.
        subsets: for each mutant the indices of its scales.
    """

    def __init__(self, num_classes: int, subsets: Sequence[Subset]):
        super().__init__()
        self.subsets = list(subsets)

    def forward(self, scales: Sequence[Tensor], subset: Subset) -> Tensor:
        """The mutant of a subset, from all scales; each tensor is ``(B, C, N)``, logits with the pixels flattened."""
        return self.mix([scales[j] for j in subset], self.subsets.index(subset))

    def mix(self, scales: list[Tensor], number: int) -> Tensor:
        """The mutant of the subset with this number, from its own scales; to be written by a subclass."""
        raise NotImplementedError


OPERATORS: Registry[type[Operator]] = Registry("operator")


class Original(Operator):
    """The identity: an original map is its only scale."""

    def mix(self, scales: list[Tensor], number: int) -> Tensor:
        return scales[0]


@OPERATORS.register("add")
class Add(Operator):
    """Σ ẑ_j."""

    def mix(self, scales: list[Tensor], number: int) -> Tensor:
        return sum(scales[1:], scales[0])


@OPERATORS.register("multiply")
class Multiply(Operator):
    """Π ẑ_j, element by element on the logits."""

    def mix(self, scales: list[Tensor], number: int) -> Tensor:
        return math.prod(scales[1:], start=scales[0])


@OPERATORS.register("concat")
class Concat(Operator):
    """1×1 convolution (C·|c| → C, with bias) of the scales stacked on channels; starts as their mean.

    Attributes:
        weight: ``(C, Σ |c| C)``, the weights ``(C, |c| C)`` of all subsets beside each other.
        bias: ``(C, M)``, a column for each subset.
    """

    def __init__(self, num_classes: int, subsets: Sequence[Subset]):
        super().__init__(num_classes, subsets)
        self.sizes = [num_classes * len(c) for c in subsets]
        means = [torch.eye(num_classes).repeat(1, len(c)) / len(c) for c in subsets]
        self.weight = nn.Parameter(torch.cat(means, 1) if means else torch.zeros(num_classes, 0))
        self.bias = nn.Parameter(torch.zeros(num_classes, len(subsets)))

    def mix(self, scales: list[Tensor], number: int) -> Tensor:
        weight: Tensor = self.weight.split(self.sizes, 1)[number]
        return convolve(weight, torch.cat(scales, 1)) + self.bias[:, number, None]


@OPERATORS.register("fusion")
class Fusion(Operator):
    """Σ a_j ẑ_j with a = softmax over j of s_j(ẑ_j), per pixel; s_j a 1×1 convolution C → 1 with bias.

    The scores start at zero, so the mutant starts as the mean of the scales.

    Attributes:
        weight: ``(Σ |c|, C)``, a row for each scale of each subset.
        bias: ``(Σ |c|, 1)``.
    """

    def __init__(self, num_classes: int, subsets: Sequence[Subset]):
        super().__init__(num_classes, subsets)
        self.starts = [0, *accumulate(map(len, subsets))]
        self.weight = nn.Parameter(torch.zeros(self.starts[-1], num_classes))
        self.bias = nn.Parameter(torch.zeros(self.starts[-1], 1))

    def mix(self, scales: list[Tensor], number: int) -> Tensor:
        rows = slice(self.starts[number], self.starts[number + 1])
        weights = self.weight[rows].split(1)
        scores = torch.cat([convolve(w, z) for w, z in zip(weights, scales, strict=True)], 1) + self.bias[rows]
        weighted: list[Tensor] = [a * z for a, z in zip(scores.softmax(1).split(1, 1), scales, strict=True)]
        return sum(weighted[1:], weighted[0])


@OPERATORS.register("subtract")
class Subtract(Operator):
    """The finest of the scales minus all others."""

    def mix(self, scales: list[Tensor], number: int) -> Tensor:
        return scales[0] - sum(scales[2:], scales[1])


@OPERATORS.register("average")
class Average(Operator):
    """Mean of the scales."""

    def mix(self, scales: list[Tensor], number: int) -> Tensor:
        return sum(scales[1:], scales[0]) / len(scales)


@OPERATORS.register("max")
class Max(Operator):
    """The greatest of the scales, element by element."""

    def mix(self, scales: list[Tensor], number: int) -> Tensor:
        return torch.stack(scales).amax(0)


def convolve(weight: Tensor, z: Tensor) -> Tensor:
    """1×1 convolution of ``(B, i, N)`` by ``(o, i)``. ``weight @ z`` would transpose z, and take ten times as long."""
    return torch.bmm(weight.expand(len(z), -1, -1), z)
