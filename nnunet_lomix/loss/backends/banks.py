"""Banks: all maps of one operator, computed together and without autograd.

A bank works on the scales of a piece of one sample, stacked: ``z (S, C, n)``. A subset is given by its places in this
stack. Each kind of operator of the paper has a bank in closed form, few large operations for all of its maps;
:class:`OneByOne` serves any other. A scale that a map doesn't have may enter it with the factor 0, so one logit that is
infinite makes all maps of a bank NaN.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nnunet_lomix.loss.operators import Add, Concat, Fusion, Multiply, Original


class Bank:
    """M maps of one operator.

    Args:
        operators: one for each map.
        places: for each map the places of its scales in the stack.
        like: a tensor ``(C, …)`` of the device and dtype of the computation.
        num_scales: S.
    """

    def __init__(self, operators: Sequence[nn.Module], places: Sequence[Sequence[int]], like: Tensor, num_scales: int):
        self.operators = operators
        self.places = places

    def forward(self, z: Tensor) -> tuple[Tensor, Any]:
        """The logits of the maps, ``(M, C, n)``, and what is kept of the way to them for :meth:`backward`."""
        raise NotImplementedError

    def backward(self, z: Tensor, kept: Any, grad_logits: Tensor, grad_z: Tensor) -> list[Tensor]:
        """Carry the gradient by the logits of the maps back to the scales.

        Args:
            z: ``(S, C, n)``.
            kept: what :meth:`forward` gave beside the logits.
            grad_logits: ``(M, C, n)``; may be overwritten.
            grad_z: ``(S, C, n)``, to which the gradient by the scales is added.

        Returns:
            The gradients by the parameters, packed as the bank likes; these add up over pieces.
        """
        raise NotImplementedError

    def unpack(self, packed: list[Tensor]) -> list[list[Tensor]]:
        """For each map the gradients by its parameters."""
        return [[] for _ in self.operators]


class OneByOne(Bank):
    """Any operator, by autograd."""

    def forward(self, z: Tensor) -> tuple[Tensor, Any]:
        maps = zip(self.operators, self.places, strict=True)
        return torch.stack([operator([z[None, p] for p in places])[0] for operator, places in maps]), None

    def backward(self, z: Tensor, kept: Any, grad_logits: Tensor, grad_z: Tensor) -> list[Tensor]:
        packed: list[Tensor] = []
        for operator, places, grad_of_map in zip(self.operators, self.places, grad_logits, strict=True):
            with torch.enable_grad():
                scales = [z[None, p].detach().requires_grad_() for p in places]
                parameters = {name: p.detach().requires_grad_() for name, p in operator.named_parameters()}
                logits = functional_call(operator, parameters, (scales,))
                inputs = [*scales, *parameters.values()]
                grads = torch.autograd.grad(logits, inputs, grad_of_map[None], materialize_grads=True)
            for p, grad_scale in zip(places, grads[: len(places)], strict=True):
                grad_z[p] += grad_scale[0]
            packed += grads[len(places) :]
        return packed

    def unpack(self, packed: list[Tensor]) -> list[list[Tensor]]:
        remaining = iter(packed)
        return [[next(remaining) for _ in operator.parameters()] for operator in self.operators]


class Originals(Bank):
    """The scales themselves."""

    def __init__(self, operators: Sequence[nn.Module], places: Sequence[Sequence[int]], like: Tensor, num_scales: int):
        super().__init__(operators, places, like, num_scales)
        self.index = torch.tensor([place for (place,) in places], device=like.device)

    def forward(self, z: Tensor) -> tuple[Tensor, Any]:
        return z.index_select(0, self.index), None

    def backward(self, z: Tensor, kept: Any, grad_logits: Tensor, grad_z: Tensor) -> list[Tensor]:
        grad_z.index_add_(0, self.index, grad_logits)
        return []


class Sums(Bank):
    """Sums, by a matrix ``(M, S)`` of 0 and 1."""

    def __init__(self, operators: Sequence[nn.Module], places: Sequence[Sequence[int]], like: Tensor, num_scales: int):
        super().__init__(operators, places, like, num_scales)
        rows = [[float(p in subset) for p in range(num_scales)] for subset in places]
        self.members = torch.tensor(rows, device=like.device, dtype=like.dtype)

    def forward(self, z: Tensor) -> tuple[Tensor, Any]:
        return (self.members @ z.flatten(1)).view(-1, *z.shape[1:]), None

    def backward(self, z: Tensor, kept: Any, grad_logits: Tensor, grad_z: Tensor) -> list[Tensor]:
        grad_z.view(len(z), -1).addmm_(self.members.T, grad_logits.flatten(1))
        return []


class Products(Bank):
    """Products, each of a scale and of a shorter product; the gradient goes back by the same steps.

    Attributes:
        steps: for each product its number among the values (the scales first, then the products), the number of the
            shorter product, or of a scale, and the scale that it is multiplied with.
    """

    def __init__(self, operators: Sequence[nn.Module], places: Sequence[Sequence[int]], like: Tensor, num_scales: int):
        super().__init__(operators, places, like, num_scales)
        maps = [tuple(subset) for subset in places]
        prefixes = {subset[:size] for subset in maps for size in range(2, len(subset))}.difference(maps)
        values = [*((p,) for p in range(num_scales)), *maps, *prefixes]
        number = {subset: i for i, subset in enumerate(values)}
        products = sorted(range(num_scales, len(values)), key=lambda i: len(values[i]))
        self.steps = [(i, number[values[i][:-1]], values[i][-1]) for i in products]

    def forward(self, z: Tensor) -> tuple[Tensor, Any]:
        products = z.new_empty(len(self.steps), *z.shape[1:])
        values = [*z, *products]
        for product, shorter, scale in self.steps:
            torch.mul(values[shorter], values[scale], out=values[product])
        return products[: len(self.places)], values

    def backward(self, z: Tensor, kept: Any, grad_logits: Tensor, grad_z: Tensor) -> list[Tensor]:
        values = kept
        grad_prefixes = z.new_zeros(len(self.steps) - len(grad_logits), *z.shape[1:])
        grad_values = [*grad_z, *grad_logits, *grad_prefixes]
        for product, shorter, scale in reversed(self.steps):
            grad_values[shorter].addcmul_(grad_values[product], values[scale])
            grad_values[scale].addcmul_(grad_values[product], values[shorter])
        return []


class Concats(Bank):
    """All convolutions as one matrix ``(M C, S C)``, with zeros for the scales that a map doesn't have."""

    def __init__(self, operators: Sequence[nn.Module], places: Sequence[Sequence[int]], like: Tensor, num_scales: int):
        super().__init__(operators, places, like, num_scales)
        self.classes = len(like)
        weight = like.new_zeros(len(places), self.classes, num_scales, self.classes)
        for row, operator, subset in zip(weight, operators, places, strict=True):
            row[:, subset] = operator.weight.detach().unflatten(1, (len(subset), -1))  # type: ignore[operator]
        self.weight = weight.flatten(2).flatten(0, 1)
        self.bias = torch.cat([operator.bias.detach() for operator in operators])  # type: ignore[operator]

    def forward(self, z: Tensor) -> tuple[Tensor, Any]:
        return torch.addmm(self.bias, self.weight, z.flatten(0, 1)).view(-1, *z.shape[1:]), None

    def backward(self, z: Tensor, kept: Any, grad_logits: Tensor, grad_z: Tensor) -> list[Tensor]:
        grad_logits = grad_logits.flatten(0, 1)
        grad_z.view(-1, z.shape[2]).addmm_(self.weight.T, grad_logits)
        # of the two ways to write this product the faster one, by a fifth on the CPU
        return [(z.flatten(0, 1) @ grad_logits.T).T, grad_logits.sum(1, keepdim=True)]

    def unpack(self, packed: list[Tensor]) -> list[list[Tensor]]:
        weight = packed[0].reshape(len(self.places), self.classes, -1, self.classes)
        biases = packed[1].split(self.classes)
        return [
            [row[:, subset].flatten(1), bias] for row, subset, bias in zip(weight, self.places, biases, strict=True)
        ]


class Fusions(Bank):
    """Attention over all scales, ``(S, M, n)``; a bias of −∞ for the scales that a map doesn't have.

    Where it is large, work is done for the maps that have a scale only, a run of neighbouring maps at a time.
    """

    def __init__(self, operators: Sequence[nn.Module], places: Sequence[Sequence[int]], like: Tensor, num_scales: int):
        super().__init__(operators, places, like, num_scales)
        self.weight = like.new_zeros(num_scales, len(places), len(like))
        self.bias = like.new_full((num_scales, len(places), 1), -torch.inf)
        for m, (operator, subset) in enumerate(zip(operators, places, strict=True)):
            self.weight[subset, m] = operator.weight.detach()[:, 0]  # type: ignore[operator]
            self.bias[subset, m, 0] = operator.bias.detach()  # type: ignore[operator]
        self.runs = [(p, run) for p in range(num_scales) for run in find_runs([p in subset for subset in places])]

    def forward(self, z: Tensor) -> tuple[Tensor, Any]:
        attention = torch.baddbmm(self.bias, self.weight, z).softmax(0)
        logits = z.new_zeros(len(self.places), *z.shape[1:])
        for p, run in self.runs:
            logits[run].addcmul_(attention[p, run, None], z[p])
        return logits, attention

    def backward(self, z: Tensor, kept: Any, grad_logits: Tensor, grad_z: Tensor) -> list[Tensor]:
        attention = kept
        grad_attention, product = torch.zeros_like(attention), torch.empty_like(grad_logits)
        for p, run in self.runs:
            torch.sum(torch.mul(grad_logits[run], z[p], out=product[run]), 1, out=grad_attention[p, run])
            grad_z[p] += torch.mul(grad_logits[run], attention[p, run, None], out=product[run]).sum(0)
        grad_scores = attention * (grad_attention - (attention * grad_attention).sum(0))
        grad_z.baddbmm_(self.weight.mT, grad_scores)
        return [grad_scores @ z.mT, grad_scores.sum(2)]

    def unpack(self, packed: list[Tensor]) -> list[list[Tensor]]:
        weight, bias = packed
        return [[weight[subset, m][:, None], bias[subset, m]] for m, subset in enumerate(self.places)]


def find_runs(flags: Sequence[bool]) -> list[slice]:
    """Where neighbouring flags are true.

    >>> find_runs([True, True, False, True])
    [slice(0, 2, None), slice(3, 4, None)]
    """
    runs = []
    for flag, group in groupby(range(len(flags)), key=flags.__getitem__):
        if flag:
            places = list(group)
            runs.append(slice(places[0], places[-1] + 1))
    return runs


# By the class itself, as a subclass of an operator may compute something else.
BANKS: dict[type[nn.Module], type[Bank]] = {
    Original: Originals,
    Add: Sums,
    Multiply: Products,
    Concat: Concats,
    Fusion: Fusions,
}
