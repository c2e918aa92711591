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

import torch
from torch import Tensor, nn

from nnunet_lomix.loss.registry import Registry

Subset = tuple[int, ...]


def count_mixed(subsets: Sequence[Subset]) -> int:
    """K, how many of the finest scales the mutants of these subsets mix."""
    return 1 + max((j for subset in subsets for j in subset), default=0)


class Operator(nn.Module):
    """Makes a mutant of each of its subsets of the scales.

    It acts on each pixel by itself and draws no random numbers, so a training run has the same random state with and
    without it.

    Args:
        num_classes: C.
        subsets: for each of the M mutants the indices of its scales.
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


class LinearOperator(Operator):
    """An operator that needs R rows of numbers that are linear in the scales, for each of its mutants.

    Attributes:
        weight: ``(M, R, K C + 1)``, in each row weights of the classes of all mixed scales and, last, the bias.
        used: 0 or 1 for each of them; what isn't used gets no gradient.
    """

    used: Tensor

    def __init__(self, num_classes: int, subsets: Sequence[Subset], rows: int):
        super().__init__(num_classes, subsets)
        self.num_classes = num_classes
        shape = len(subsets), rows, count_mixed(subsets) * num_classes + 1
        self.weight = nn.Parameter(torch.zeros(shape))
        self.register_buffer("used", torch.zeros(shape), persistent=False)
        for number, subset in enumerate(subsets):
            for j in subset:
                self.used[number, self.rows(j), self.columns(j)] = 1
                self.used[number, self.rows(j), -1] = 1

    def rows(self, scale: int) -> slice:
        """Those that a scale enters."""
        raise NotImplementedError

    def columns(self, scale: int) -> slice:
        """Those of the classes of a scale."""
        return slice(scale * self.num_classes, (scale + 1) * self.num_classes)


@OPERATORS.register("concat")
class Concat(LinearOperator):
    """1×1 convolution (C·|c| → C, with bias) of the scales stacked on channels; starts as their mean.

    Its rows are the classes of the mutant.
    """

    def __init__(self, num_classes: int, subsets: Sequence[Subset]):
        super().__init__(num_classes, subsets, num_classes)
        for number, subset in enumerate(subsets):
            for j in subset:
                self.weight.data[number, :, self.columns(j)] = torch.eye(num_classes) / len(subset)

    def rows(self, scale: int) -> slice:
        return slice(None)

    def mix(self, scales: list[Tensor], number: int) -> Tensor:
        own = self.weight[number]
        weight = torch.cat([own[:, self.columns(j)] for j in self.subsets[number]], 1)
        return convolve(weight, torch.cat(scales, 1)) + own[:, -1:]


@OPERATORS.register("fusion")
class Fusion(LinearOperator):
    """Σ a_j ẑ_j with a = softmax over j of s_j(ẑ_j), per pixel; s_j a 1×1 convolution C → 1 with bias.

    Its rows are the scores of the mixed scales. They start at zero, so the mutant starts as the mean of the scales.
    """

    def __init__(self, num_classes: int, subsets: Sequence[Subset]):
        super().__init__(num_classes, subsets, count_mixed(subsets))

    def rows(self, scale: int) -> slice:
        return slice(scale, scale + 1)

    def mix(self, scales: list[Tensor], number: int) -> Tensor:
        own = self.weight[number]
        pairs = zip(self.subsets[number], scales, strict=True)
        scores = torch.cat([convolve(own[self.rows(j), self.columns(j)], z) + own[j, -1] for j, z in pairs], 1)
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
