"""No map exists as a whole: pixels are walked over in parts that fit into the processor's cache, twice.

The forward pass adds up the sums of all maps part by part and keeps nothing else. The backward pass forms each map of
each part again, takes its gradient from the gradient by the sums, and carries it to the outputs, each at its own
resolution, and to the parameters of the operators.

A *part* is some rows of some samples at full resolution, all scales of it resampled. A *piece* is some pixels of one
sample of a part, few enough for all maps of an operator at once.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nnunet_lomix.loss.backends.banks import BANKS, Bank, OneByOne
from nnunet_lomix.loss.backends.base import BACKENDS, BoundMap, Case, full_precision, of_chosen
from nnunet_lomix.loss.criterion import Criterion, PixelSums, Target, TargetPart, TargetSums

# Values of an output in a part, and of the maps that each thread treats together in a piece of it: few enough for the
# cache of a processor and enough to be worth a call (measured), or enough to keep a GPU busy.
VALUES, VALUES_ELSEWHERE = {"cpu": 2**19}, 2**22


@BACKENDS.register("lean")
class Lean:
    """Memory: gradients of the outputs, and some values for each pixel of a part, however many maps there are."""

    priority = 0

    def unsupported(self, case: Case) -> str | None:
        return None

    def suits(self, case: Case) -> bool:
        return True

    def __call__(
        self,
        outputs: Sequence[Tensor],
        target: Target,
        maps: Sequence[BoundMap],
        criterion: Criterion,
        chosen: Tensor | None = None,
    ) -> tuple[PixelSums, TargetSums]:
        def compute(maps: Sequence[BoundMap]) -> PixelSums:
            evaluator = LeanEvaluator(maps, criterion, outputs[0])
            return PixelSums(*Walk.apply(target, evaluator, len(outputs), *outputs, *evaluator.parameters))

        return of_chosen(compute, maps, chosen), criterion.target_sums(target)


class LeanEvaluator:
    """Evaluates all maps in a part of b samples and n pixels.

    ``scales`` are the resampled outputs by their index, each ``(b, C, n)``.

    Args:
        maps, criterion: as for a backend.
        like: an output, for number of classes, device and dtype.

    Attributes:
        used: the outputs that the maps need.
        parameters: those of the operators, map after map.
        numbers_of: for each kind of operator the numbers of its maps; the banks have them in this order.
        order: the numbers of all maps in the order of the banks, ``(M,)``.
    """

    def __init__(self, maps: Sequence[BoundMap], criterion: Criterion, like: Tensor):
        self.maps = maps
        self.criterion = criterion
        self.like = like.detach()
        self.used = sorted({j for m in maps for j in m.scales})
        self.parameters = [p for m in maps for p in m.operator.parameters()]
        self.numbers_of: dict[type[nn.Module], list[int]] = {}
        for i, m in enumerate(maps):
            self.numbers_of.setdefault(type(m.operator), []).append(i)
        for numbers in self.numbers_of.values():
            numbers.sort(key=lambda i: gray_rank(maps[i].scales, self.used))
        self.order = torch.tensor([i for numbers in self.numbers_of.values() for i in numbers], device=like.device)

    def forward(self, scales: dict[int, Tensor], part: TargetPart) -> PixelSums:
        """Sums over the pixels of the part, for each map."""
        z = torch.stack(list(scales.values()), 1)
        total = PixelSums.zeros(len(self.maps), z[:, 0])
        for sample, pixels in self._pieces(z):
            sums = self._forward_piece(z[sample, :, :, pixels].contiguous(), part.piece(sample, pixels))
            total.add(sums, slice(sample, sample + 1))
        return total.select_maps(self.order.argsort())

    def backward(
        self, scales: dict[int, Tensor], part: TargetPart, grad_sums: PixelSums
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients by the used scales and by the parameters, from the gradient by the sums of :meth:`forward`."""
        z = torch.stack(list(scales.values()), 1)
        grad_sums = grad_sums.select_maps(self.order)
        packed_of_banks: list[list[Tensor]] | None = None
        for sample, pixels in self._pieces(z):
            piece = z[sample, :, :, pixels].contiguous()
            grad_sums_of_sample = grad_sums.select_samples(slice(sample, sample + 1))
            grad_z, packed = self._backward_piece(piece, part.piece(sample, pixels), grad_sums_of_sample)
            z[sample, :, :, pixels] = grad_z  # no other piece needs what was there
            if packed_of_banks is None:
                packed_of_banks = packed
            else:
                packed_of_banks = [
                    [a + b for a, b in zip(*both, strict=True)] for both in zip(packed_of_banks, packed, strict=True)
                ]
        grad_parameters: dict[int, list[Tensor]] = {}
        for bank, numbers, packed_of_bank in zip(
            self.banks, self.numbers_of.values(), packed_of_banks or [], strict=True
        ):
            grad_parameters |= zip(numbers, bank.unpack(packed_of_bank), strict=True)
        return list(z.unbind(1)), [grad for i in range(len(self.maps)) for grad in grad_parameters[i]]

    def _forward_piece(self, z: Tensor, part: TargetPart) -> PixelSums:
        """The sums of the maps of all banks, one after the other, for ``z (S, C, n)`` of one sample."""
        return PixelSums.cat([self.criterion.pixel_sums(bank.forward(z)[0][:, None], part) for bank in self.banks])

    def _backward_piece(self, z: Tensor, part: TargetPart, grad_sums: PixelSums) -> tuple[Tensor, list[list[Tensor]]]:
        """The gradient by ``z``, and for each bank those by its parameters, packed; maps as in _forward_piece."""
        grad_z, packed = torch.zeros_like(z), []
        sizes = [len(numbers) for numbers in self.numbers_of.values()]
        for bank, grad_of_bank in zip(self.banks, grad_sums.split(sizes), strict=True):
            logits, kept = bank.forward(z)
            grad_logits = self.criterion.pixel_sums_vjp(logits[:, None], part, grad_of_bank)[:, 0]
            packed.append(bank.backward(z, kept, grad_logits, grad_z))
        return grad_z, packed

    @cached_property
    def banks(self) -> list[Bank]:
        """For each kind of operator its maps; once for all parts, as the parameters don't change on the way."""
        place = {j: i for i, j in enumerate(self.used)}
        return [
            BANKS.get(kind, OneByOne)(
                [self.maps[i].operator for i in numbers],
                [[place[j] for j in self.maps[i].scales] for i in numbers],
                self.like[0],
                len(self.used),
            )
            for kind, numbers in self.numbers_of.items()
        ]

    def _pieces(self, z: Tensor) -> Iterator[tuple[int, slice]]:
        """Samples and pixels, few enough that no bank has more than the values of a piece."""
        batch, _, classes, pixels = z.shape
        step = max(1, self.values_of_piece() // (classes * max(map(len, self.numbers_of.values()))))
        step -= step % min(step, 16)  # addresses that vectors of values can be loaded from
        return ((sample, slice(i, i + step)) for sample in range(batch) for i in range(0, pixels, step))

    def values_of_piece(self) -> int:
        """The most values of the maps of a bank in a piece."""
        kind = self.like.device.type
        return VALUES.get(kind, VALUES_ELSEWHERE) * (torch.get_num_threads() if kind == "cpu" else 1)


def gray_rank(scales: Sequence[int], used: Sequence[int]) -> list[int]:
    """The rank of a subset in the reflected binary (Gray) code, as a sort key.

    In this order neighbouring subsets differ in few scales, so the maps that have a scale form few runs, and fusion
    works on runs. A digit of the rank is the parity of the members so far.

    >>> subsets = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    >>> sorted(subsets, key=lambda scales: gray_rank(scales, [0, 1, 2]))
    [(2,), (1, 2), (1,), (0, 1), (0, 1, 2), (0, 2), (0,)]
    """
    digits, parity = [], 0
    for j in used:
        parity ^= j in scales
        digits.append(parity)
    return digits


class Walk(torch.autograd.Function):
    """Outputs and parameters of the operators to the sums of the M maps, ``(M,)`` and twice ``(M, B, C)``."""

    @staticmethod
    def forward(ctx: Any, target: Target, evaluator: LeanEvaluator, num_outputs: int, *tensors: Tensor) -> PixelSums:
        ctx.save_for_backward(*tensors)
        ctx.target, ctx.evaluator, ctx.num_outputs = target, evaluator, num_outputs
        outputs = tensors[:num_outputs]
        total = PixelSums.zeros(len(evaluator.maps), outputs[0])
        for samples, rows in parts(outputs[0]):
            part = evaluator.criterion.part(target, samples, pixels_of(rows, target.size))
            scales = {j: Band(outputs[j], samples, rows, target.size).resampled() for j in evaluator.used}
            total.add(evaluator.forward(scales, part), samples)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        target, evaluator = ctx.target, ctx.evaluator
        outputs, parameters = ctx.saved_tensors[: ctx.num_outputs], ctx.saved_tensors[ctx.num_outputs :]
        grad_outputs = [torch.zeros(z.shape, dtype=z.dtype, device=z.device) for z in outputs]
        grad_parameters = [torch.zeros_like(p) for p in parameters]
        with full_precision(outputs[0].device.type):
            for samples, rows in parts(outputs[0]):
                part = evaluator.criterion.part(target, samples, pixels_of(rows, target.size))
                bands = [Band(outputs[j], samples, rows, target.size) for j in evaluator.used]
                with torch.enable_grad():
                    resampled = [band.resampled() for band in bands]
                scales = {j: z.detach() for j, z in zip(evaluator.used, resampled, strict=True)}
                grad_scales, grad_of_part = evaluator.backward(
                    scales, part, PixelSums(*grad_sums).select_samples(samples)
                )
                for total, grad in zip(grad_parameters, grad_of_part, strict=True):
                    total += grad
                for j, band, z, grad in zip(evaluator.used, bands, resampled, grad_scales, strict=True):
                    grad_outputs[j][samples, :, band.rows] += torch.autograd.grad(z, band.values, grad)[0]
        return None, None, None, *grad_outputs, *grad_parameters


def parts(output: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and rows (of the first spatial axis) of each part: several whole samples, or some rows of one."""
    batch, classes, height, *rest = output.shape
    rows = VALUES.get(output.device.type, VALUES_ELSEWHERE) // (classes * prod(rest))
    samples_at_once, rows_at_once = max(1, rows // height), max(1, rows)
    for first in range(0, batch, samples_at_once):
        samples = slice(first, min(first + samples_at_once, batch))
        for top in range(0, height, rows_at_once):
            yield samples, slice(top, min(top + rows_at_once, height))


def pixels_of(rows: slice, size: torch.Size) -> slice:
    """The flattened pixels of some rows."""
    width = prod(size[1:])
    return slice(rows.start * width, rows.stop * width)


class Band:
    """The rows of an output that some rows at full resolution are interpolated from.

    Args:
        output: ``(B, C, *spatial)``.
        samples, rows: samples, and rows at full resolution.
        size: full resolution.
    """

    def __init__(self, output: Tensor, samples: slice, rows: slice, size: torch.Size):
        self.size = size
        self.rows = rows
        self.row_neighbours = None
        if output.shape[2] != size[0]:
            self.row_neighbours = Neighbours(output, 2, rows, size[0])
            self.rows = self.row_neighbours.needed
        self.values = output[samples, :, self.rows].detach().requires_grad_()

    def resampled(self) -> Tensor:
        """``(b, C, n)`` at full resolution, pixels flattened."""
        z = self.values
        if self.row_neighbours is not None:
            z = self.row_neighbours.interpolate(z)
        rest = self.size[1:]
        if z.shape[3:] != rest:
            if len(rest) == 1 and z.is_cuda:  # there F.interpolate is slow along one axis, and not deterministic
                z = Neighbours(z, 3, slice(0, rest[0]), rest[0]).interpolate(z)
            else:
                mode = "linear" if len(rest) == 1 else "bilinear"
                channels_and_rows = z.shape[1:3]
                z = F.interpolate(z.flatten(1, 2), rest, mode=mode, align_corners=False)
                z = z.unflatten(1, channels_and_rows)
        return z.flatten(2)


class Neighbours:
    """The coarse positions along an axis beside some fine ones, and how far between them these lie.

    As F.interpolate with align_corners=False.

    Args:
        z: what has the coarse axis.
        axis: its number.
        fine: the fine positions.
        size: how many fine positions there are in all.

    Attributes:
        needed: the coarse positions that are neighbours.
    """

    def __init__(self, z: Tensor, axis: int, fine: slice, size: int):
        coarse = z.shape[axis]
        centres = [max((position + 0.5) * coarse / size - 0.5, 0.0) for position in range(fine.start, fine.stop)]
        low = [int(centre) for centre in centres]
        high = [min(position + 1, coarse - 1) for position in low]
        self.axis = axis
        self.needed = slice(low[0], high[-1] + 1)
        self.low, self.high = (torch.tensor(positions, device=z.device) - low[0] for positions in (low, high))
        fractions = [centre - position for centre, position in zip(centres, low, strict=True)]
        self.fraction = z.new_tensor(fractions).view(-1, *[1] * (z.ndim - axis - 1))

    def interpolate(self, z: Tensor) -> Tensor:
        """``z``, which has the needed positions along the axis, with the fine ones in their place."""
        return torch.lerp(z.index_select(self.axis, self.low), z.index_select(self.axis, self.high), self.fraction)
