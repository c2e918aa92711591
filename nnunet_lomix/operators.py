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
from itertools import accumulate

import torch
from torch import Tensor, nn

from nnunet_lomix.registry import Registry

OPERATORS = Registry("operator")


class Operator(nn.Module):
    """Base of the operators."""

    def pull(self, scales: list[Tensor], gradient: Tensor) -> list[Tensor]:
        """Carry a gradient by the mutant ``(B, C, N)`` back to each of the scales, then to each of the parameters.

        Here by autograd. The operators of the paper have it in closed form, which is much faster in small parts.
        """
        with torch.enable_grad():
            scales = [z.detach().requires_grad_() for z in scales]
            return list(
                torch.autograd.grad(self(scales), [*scales, *self.parameters()], gradient, materialize_grads=True)
            )


class Original(Operator):
    """The identity: an original map is its only scale."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        return scales[0]

    def pull(self, scales, gradient):
        return [gradient]


def convolve(weight: Tensor, z: Tensor) -> Tensor:
    """1×1 convolution of ``(B, i, N)`` by ``(o, i)``. ``weight @ z`` would transpose z, and take ten times as long."""
    return torch.bmm(weight.expand(len(z), -1, -1), z)


class ParameterFree(Operator):
    """Base of the operators without parameters."""

    def __init__(self, num_classes: int, num_scales: int):
        super().__init__()


@OPERATORS.register("add")
class Add(ParameterFree):
    """Σ ẑ_j."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        return sum(scales[1:], scales[0])

    def pull(self, scales, gradient):
        return [gradient] * len(scales)


@OPERATORS.register("multiply")
class Multiply(ParameterFree):
    """Π ẑ_j, element by element on the logits."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        return math.prod(scales[1:], start=scales[0])

    def pull(self, scales, gradient):
        # the gradient times all other scales: those before, from left to right, and those after, from right to left
        before = list(accumulate(scales[:-1], torch.mul, initial=gradient))
        after = list(accumulate(scales[:0:-1], torch.mul))[::-1]
        return [b * a for b, a in zip(before, after, strict=False)] + before[-1:]


@OPERATORS.register("concat")
class Concat(Operator):
    """1×1 convolution (C·|c| → C, with bias) of the scales stacked on channels; starts as their mean."""

    def __init__(self, num_classes: int, num_scales: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(num_classes).repeat(1, num_scales) / num_scales)
        self.bias = nn.Parameter(torch.zeros(num_classes, 1))

    def forward(self, scales: list[Tensor]) -> Tensor:
        return convolve(self.weight, torch.cat(scales, 1)) + self.bias

    def pull(self, scales, gradient):
        weight = torch.cat([(gradient @ z.mT).sum(0) for z in scales], 1)
        of_scales = convolve(self.weight.mT, gradient).split(gradient.shape[1], 1)
        return [*of_scales, weight, gradient.sum((0, 2))[:, None]]


@OPERATORS.register("fusion")
class Fusion(Operator):
    """Σ a_j ẑ_j with a = softmax over j of s_j(ẑ_j), per pixel; s_j a 1×1 convolution C → 1 with bias.

    The scores start at zero, so the mutant starts as the mean of the scales.
    """

    def __init__(self, num_classes: int, num_scales: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_scales, 1, num_classes))
        self.bias = nn.Parameter(torch.zeros(num_scales))

    def attention(self, scales: list[Tensor]) -> Tensor:
        """a, ``(B, |c|, N)``."""
        scores = torch.cat([convolve(w, z) for w, z in zip(self.weight, scales, strict=True)], 1) + self.bias[:, None]
        return scores.softmax(1)

    def forward(self, scales: list[Tensor]) -> Tensor:
        weighted = [a[:, None] * z for a, z in zip(self.attention(scales).unbind(1), scales, strict=True)]
        return sum(weighted[1:], weighted[0])

    def pull(self, scales, gradient):
        attention = self.attention(scales)
        by_attention = torch.stack([(gradient * z).sum(1) for z in scales], 1)
        by_scores = attention * (by_attention - (attention * by_attention).sum(1, keepdim=True))
        of_scales = [
            torch.addcmul(a * gradient, w.mT, by_score)
            for a, w, by_score in zip(attention.split(1, 1), self.weight, by_scores.split(1, 1), strict=True)
        ]
        weight = torch.stack([(s @ z.mT).sum(0) for s, z in zip(by_scores.split(1, 1), scales, strict=True)])
        return [*of_scales, weight, by_scores.sum((0, 2))]


@OPERATORS.register("subtract")
class Subtract(ParameterFree):
    """The finest of the scales minus all others."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        return scales[0] - sum(scales[1:])


@OPERATORS.register("average")
class Average(ParameterFree):
    """Mean of the scales."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        return sum(scales) / len(scales)


@OPERATORS.register("max")
class Max(ParameterFree):
    """The greatest of the scales, element by element."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        return torch.stack(scales).amax(0)
