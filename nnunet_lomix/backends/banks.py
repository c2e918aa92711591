"""Banks: all maps of one operator, computed together and without autograd.

A bank works on the scales of a piece of one sample, stacked: ``z (S, C, n)``. The subset of a map is given by places in
this stack. Each kind of operator of the paper has a bank in closed form, few large operations for all of its maps;
:class:`OneByOne` serves any other. A scale that a map doesn't have may enter it with the factor 0, so one logit that is
infinite makes all maps of a bank NaN.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nnunet_lomix.operators import Add, Concat, Fusion, Multiply, Original


class Bank:
    """M maps of one operator.

    Args:
        mixers: their operators.
        places: for each map the places of its scales in the stack.
        like: a tensor ``(C, …)`` of the device and dtype of the computation.
        num_scales: S.
    """

    def __init__(self, mixers: Sequence[nn.Module], places: Sequence[Sequence[int]], like: Tensor, num_scales: int):
        self.mixers = mixers
        self.places = places

    def mix(self, z: Tensor) -> tuple[Tensor, Any]:
        """The maps, ``(M, C, n)``, and what is kept of the way to them for :meth:`pull`."""
        raise NotImplementedError

    def pull(self, z: Tensor, kept: Any, gradient: Tensor, of_z: Tensor) -> list[Tensor]:
        """Carry a gradient by the maps back.

        Args:
            z: ``(S, C, n)``.
            kept: what :meth:`mix` gave beside the maps.
            gradient: by the maps, ``(M, C, n)``; may be overwritten.
            of_z: ``(S, C, n)``, to which the gradient by the scales is added.

        Returns:
            The gradients by the parameters, packed as the bank likes; these add up over pieces.
        """
        raise NotImplementedError

    def unpack(self, packed: list[Tensor]) -> list[list[Tensor]]:
        """For each map the gradients by its parameters."""
        return [[] for _ in self.mixers]


class OneByOne(Bank):
    """Any operator, by autograd."""

    def mix(self, z):
        maps = [mix([z[None, p] for p in places])[0] for mix, places in zip(self.mixers, self.places, strict=True)]
        return torch.stack(maps), None

    def pull(self, z, kept, gradient, of_z):
        packed = []
        for mix, places, of_map in zip(self.mixers, self.places, gradient, strict=True):
            with torch.enable_grad():
                scales = [z[None, p].detach().requires_grad_() for p in places]
                parameters = {name: p.detach().requires_grad_() for name, p in mix.named_parameters()}
                mixed, inputs = functional_call(mix, parameters, (scales,)), [*scales, *parameters.values()]
                gradients = torch.autograd.grad(mixed, inputs, of_map[None], materialize_grads=True)
            for p, of_scale in zip(places, gradients, strict=False):
                of_z[p] += of_scale[0]
            packed += gradients[len(places) :]
        return packed

    def unpack(self, packed):
        remaining = iter(packed)
        return [[next(remaining) for _ in mix.parameters()] for mix in self.mixers]


class Originals(Bank):
    """The scales themselves."""

    def __init__(self, mixers, places, like, num_scales):
        super().__init__(mixers, places, like, num_scales)
        self.index = torch.tensor([p for (p,) in places], device=like.device)

    def mix(self, z):
        return z.index_select(0, self.index), None

    def pull(self, z, kept, gradient, of_z):
        of_z.index_add_(0, self.index, gradient)
        return []


class Sums(Bank):
    """Sums, by a matrix ``(M, S)`` of 0 and 1."""

    def __init__(self, mixers, places, like, num_scales):
        super().__init__(mixers, places, like, num_scales)
        rows = [[float(p in subset) for p in range(num_scales)] for subset in places]
        self.members = torch.tensor(rows, device=like.device, dtype=like.dtype)

    def mix(self, z):
        return (self.members @ z.flatten(1)).view(-1, *z.shape[1:]), None

    def pull(self, z, kept, gradient, of_z):
        of_z.view(len(z), -1).addmm_(self.members.T, gradient.flatten(1))
        return []


class Products(Bank):
    """Products, each of a scale and of a shorter product; the gradient goes back by the same steps."""

    def __init__(self, mixers, places, like, num_scales):
        super().__init__(mixers, places, like, num_scales)
        maps = [tuple(subset) for subset in places]
        shorter = {subset[:size] for subset in maps for size in range(2, len(subset))}.difference(maps)
        values = [*((p,) for p in range(num_scales)), *maps, *shorter]
        number = {subset: i for i, subset in enumerate(values)}
        products = sorted(range(num_scales, len(values)), key=lambda i: len(values[i]))
        self.steps = [(i, number[values[i][:-1]], values[i][-1]) for i in products]

    def mix(self, z):
        products = z.new_empty(len(self.steps), *z.shape[1:])
        values = [*z, *products]
        for product, shorter, scale in self.steps:
            torch.mul(values[shorter], values[scale], out=values[product])
        return products[: len(self.places)], values

    def pull(self, z, values, gradient, of_z):
        of_values = [*of_z, *gradient, *z.new_zeros(len(self.steps) - len(gradient), *z.shape[1:])]
        for product, shorter, scale in reversed(self.steps):
            of_values[shorter].addcmul_(of_values[product], values[scale])
            of_values[scale].addcmul_(of_values[product], values[shorter])
        return []


class Concats(Bank):
    """All convolutions as one matrix ``(M C, S C)``, with zeros for the scales that a map doesn't have."""

    def __init__(self, mixers, places, like, num_scales):
        super().__init__(mixers, places, like, num_scales)
        self.classes = len(like)
        weight = like.new_zeros(len(places), self.classes, num_scales, self.classes)
        for row, mix, subset in zip(weight, mixers, places, strict=True):
            row[:, subset] = mix.weight.detach().unflatten(1, (len(subset), -1))
        self.weight = weight.flatten(2).flatten(0, 1)
        self.bias = torch.cat([mix.bias.detach() for mix in mixers])

    def mix(self, z):
        return torch.addmm(self.bias, self.weight, z.flatten(0, 1)).view(-1, *z.shape[1:]), None

    def pull(self, z, kept, gradient, of_z):
        gradient = gradient.flatten(0, 1)
        of_z.view(-1, z.shape[2]).addmm_(self.weight.T, gradient)
        # of the two ways to write this product the faster one, by a fifth on the CPU
        return [(z.flatten(0, 1) @ gradient.T).T, gradient.sum(1, keepdim=True)]

    def unpack(self, packed):
        weight = packed[0].reshape(len(self.places), self.classes, -1, self.classes)
        biases = packed[1].split(self.classes)
        return [
            [row[:, subset].flatten(1), bias] for row, subset, bias in zip(weight, self.places, biases, strict=True)
        ]


class Fusions(Bank):
    """Attention over all scales, ``(S, M, n)``; a bias of −∞ for the scales that a map doesn't have.

    Where it is large, work is done for the maps that have a scale only, a run of neighbouring maps at a time.
    """

    def __init__(self, mixers, places, like, num_scales):
        super().__init__(mixers, places, like, num_scales)
        self.weight = like.new_zeros(num_scales, len(places), len(like))
        self.bias = like.new_full((num_scales, len(places), 1), -torch.inf)
        for m, (mix, subset) in enumerate(zip(mixers, places, strict=True)):
            self.weight[subset, m] = mix.weight.detach()[:, 0]
            self.bias[subset, m, 0] = mix.bias.detach()
        self.runs = [(p, run) for p in range(num_scales) for run in runs([p in subset for subset in places])]

    def mix(self, z):
        attention = torch.baddbmm(self.bias, self.weight, z).softmax(0)
        maps = z.new_zeros(len(self.places), *z.shape[1:])
        for p, run in self.runs:
            maps[run].addcmul_(attention[p, run, None], z[p])
        return maps, attention

    def pull(self, z, attention, gradient, of_z):
        by_attention, product = torch.zeros_like(attention), torch.empty_like(gradient)
        for p, run in self.runs:
            torch.sum(torch.mul(gradient[run], z[p], out=product[run]), 1, out=by_attention[p, run])
            of_z[p] += torch.mul(gradient[run], attention[p, run, None], out=product[run]).sum(0)
        by_scores = attention * (by_attention - (attention * by_attention).sum(0))
        of_z.baddbmm_(self.weight.mT, by_scores)
        return [by_scores @ z.mT, by_scores.sum(2)]

    def unpack(self, packed):
        weight, bias = packed
        return [[weight[subset, m][:, None], bias[subset, m]] for m, subset in enumerate(self.places)]


def runs(flags: Sequence[bool]) -> list[slice]:
    """Where neighbouring flags are true.

    >>> runs([True, True, False, True])
    [slice(0, 2, None), slice(3, 4, None)]
    """
    groups = groupby(range(len(flags)), key=flags.__getitem__)
    return [slice(run[0], run[-1] + 1) for flag, (*run,) in groups if flag]


# a subclass of an operator may compute something else
BANKS = {Original: Originals, Add: Sums, Multiply: Products, Concat: Concats, Fusion: Fusions}
