"""No map exists as a whole: pixels are walked over in parts that fit into the processor's cache, twice.

The forward pass adds up the statistics of all maps part by part and keeps nothing else. The backward pass forms
each map of each part again, takes its gradient from the derivatives by the statistics, and carries it to the outputs,
each at its own resolution, and to the parameters of the operators.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from math import prod
from operator import xor

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nnunet_lomix.backends.banks import BANKS, Bank, OneByOne
from nnunet_lomix.backends.base import BACKENDS, full_precision
from nnunet_lomix.terms import Statistics, Truth

# Values of an output in a part, and of the maps that each thread treats together in a piece of it: few enough for the
# cache of a processor and enough to be worth a call (measured), or enough to keep a GPU busy.
VALUES, VALUES_ELSEWHERE = {"cpu": 2**19}, 2**22


@BACKENDS.register("lean")
def lean(outputs, target, mixers, terms) -> Statistics:
    """Memory: gradients of the outputs, and some values for each pixel of a part, however many maps there are."""
    return walk(outputs, target, LeanMaps(mixers, terms, outputs[0]))


def walk(outputs, target, maps: "LeanMaps") -> Statistics:
    """The statistics of all maps of the whole target, part by part."""
    return Statistics(*Walk.apply(target, maps, len(outputs), *outputs, *maps.parameters))


class LeanMaps:
    """All maps of a part of b samples and n pixels. ``scales`` are the resampled outputs by index, ``(b, C, n)``.

    Args:
        mixers, terms: as for a backend.
        like: an output, for number of classes, device and dtype.

    Attributes:
        used: the outputs that the maps need.
        parameters: those of the operators.
        kinds: the numbers of the maps of each kind of operator, and so of each bank.
        numbers: the same in one row.
        bank_of: the bank of each kind of operator.
        statistics_of_maps, gradient_of_maps: the methods of ``terms``.
    """

    bank_of = BANKS

    def __init__(self, mixers, terms, like: Tensor):
        self.mixers = mixers
        self.terms = terms
        self.statistics_of_maps, self.gradient_of_maps = terms.statistics, terms.gradient
        self.like = like.detach()
        self.used = sorted({j for _, subset in mixers for j in subset})
        self.parameters = [p for mix, _ in mixers for p in mix.parameters()]
        # the maps of each kind of operator, by number, those that have a scale in common near each other (a Gray code)
        self.kinds = {}
        for i, (mix, _) in enumerate(mixers):
            self.kinds.setdefault(type(mix), []).append(i)
        for maps in self.kinds.values():
            maps.sort(key=lambda i: [*accumulate((j in mixers[i][1] for j in self.used), xor)])
        self.numbers = torch.tensor([i for maps in self.kinds.values() for i in maps], device=like.device)

    def statistics(self, scales: dict[int, Tensor], truth: Truth) -> Statistics:
        """Sums over the pixels of the part, for each map."""
        z = torch.stack(list(scales.values()), 1)
        sums = Statistics.zeros(len(self.mixers), z[:, 0])
        for sample, pixels in self._pieces(z):
            s = self.statistics_of_piece(z[sample, :, :, pixels].contiguous(), truth.part(sample, pixels))
            sums.cross_entropy += s.cross_entropy
            sums.intersection[:, sample] += s.intersection[:, 0]
            sums.volume[:, sample] += s.volume[:, 0]
        order = self.numbers.argsort()
        return Statistics(*(of_maps[order] for of_maps in vars(sums).values()))

    def pull(self, scales: dict[int, Tensor], truth: Truth, by: Statistics) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients by the used scales and by the parameters, where ``by`` are the derivatives by the statistics."""
        z = torch.stack(list(scales.values()), 1)
        by_sample = [by.part(self.numbers, sample) for sample in range(len(z))]
        packed = None
        for sample, pixels in self._pieces(z):
            piece, true = z[sample, :, :, pixels].contiguous(), truth.part(sample, pixels)
            of_piece, of_banks = self.pull_piece(piece, true, by_sample[sample])
            z[sample, :, :, pixels] = of_piece  # no other piece needs what was there
            if packed is not None:
                of_banks = [[*map(torch.add, *both)] for both in zip(packed, of_banks, strict=True)]
            packed = of_banks
        of_maps = {}
        for bank, maps, gradients in zip(self.banks, self.kinds.values(), packed, strict=True):
            of_maps |= zip(maps, bank.unpack(gradients), strict=True)
        return list(z.unbind(1)), [g for i in range(len(self.mixers)) for g in of_maps[i]]

    def statistics_of_piece(self, z: Tensor, truth: Truth) -> Statistics:
        """Those of the maps of all banks, one after the other, for ``z (S, C, n)`` of one sample."""
        by_bank = [self.statistics_of_maps(bank.mix(z)[0][:, None], truth) for bank in self.banks]
        return Statistics(*map(torch.cat, zip(*(vars(s).values() for s in by_bank), strict=True)))

    def pull_piece(self, z: Tensor, truth: Truth, by: Statistics) -> tuple[Tensor, list[list[Tensor]]]:
        """Gradients by ``z``, and for each bank those by the parameters, packed; maps as in statistics_of_piece."""
        of_z, packed = torch.zeros_like(z), []
        for bank, by_maps in zip(self.banks, by.split([*map(len, self.kinds.values())]), strict=True):
            maps, kept = bank.mix(z)
            gradient = self.gradient_of_maps(maps[:, None], truth, by_maps)[:, 0]
            packed.append(bank.pull(z, kept, gradient, of_z))
        return of_z, packed

    @cached_property
    def banks(self) -> list[Bank]:
        """For each kind of operator its maps; once for all parts, as the parameters don't change on the way."""
        place = {j: i for i, j in enumerate(self.used)}
        return [
            self.bank_of.get(kind, OneByOne)(
                [self.mixers[i][0] for i in maps],
                [[place[j] for j in self.mixers[i][1]] for i in maps],
                self.like[0],
                len(self.used),
            )
            for kind, maps in self.kinds.items()
        ]

    def _pieces(self, z: Tensor) -> Iterator[tuple[int, slice]]:
        """Samples and pixels, few enough that no bank has more than the values of a piece."""
        batch, _, classes, pixels = z.shape
        step = max(1, self.values_of_piece() // (classes * max(map(len, self.kinds.values()))))
        step -= step % min(step, 16)  # addresses that vectors of values can be loaded from
        return ((sample, slice(i, i + step)) for sample in range(batch) for i in range(0, pixels, step))

    def values_of_piece(self) -> int:
        """The most values of the maps of a bank in a piece."""
        kind = self.like.device.type
        return VALUES.get(kind, VALUES_ELSEWHERE) * (torch.get_num_threads() if kind == "cpu" else 1)


class Walk(torch.autograd.Function):
    """Outputs and parameters of the operators to the statistics of the M maps, ``(M,)`` and twice ``(M, B, C)``."""

    @staticmethod
    def forward(ctx, target, maps, num_outputs, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.target, ctx.maps, ctx.num_outputs = target, maps, num_outputs
        outputs = tensors[:num_outputs]
        sums = Statistics.zeros(len(maps.mixers), outputs[0])
        for samples, rows in parts(outputs[0]):
            truth = maps.terms.truth(target, samples, pixels_of(rows, target.size))
            scales = {j: Band(outputs[j], samples, rows, target.size).resampled() for j in maps.used}
            s = maps.statistics(scales, truth)
            sums.cross_entropy += s.cross_entropy
            sums.intersection[:, samples] += s.intersection
            sums.volume[:, samples] += s.volume
        return sums.cross_entropy, sums.intersection, sums.volume

    @staticmethod
    @once_differentiable
    def backward(ctx, by_cross_entropy, by_intersection, by_volume):
        target, maps = ctx.target, ctx.maps
        outputs, parameters = ctx.saved_tensors[: ctx.num_outputs], ctx.saved_tensors[ctx.num_outputs :]
        of_outputs = [torch.zeros(z.shape, dtype=z.dtype, device=z.device) for z in outputs]
        of_parameters = [torch.zeros_like(p) for p in parameters]
        with full_precision(outputs[0].device.type):
            for samples, rows in parts(outputs[0]):
                truth = maps.terms.truth(target, samples, pixels_of(rows, target.size))
                bands = [Band(outputs[j], samples, rows, target.size) for j in maps.used]
                with torch.enable_grad():
                    resampled = [band.resampled() for band in bands]
                scales = {j: z.detach() for j, z in zip(maps.used, resampled, strict=True)}
                by = Statistics(by_cross_entropy, by_intersection[:, samples], by_volume[:, samples])
                of_scales, of_part = maps.pull(scales, truth, by)
                for total, gradient in zip(of_parameters, of_part, strict=True):
                    total += gradient
                for j, band, z, gradient in zip(maps.used, bands, resampled, of_scales, strict=True):
                    of_outputs[j][samples, :, band.rows] += torch.autograd.grad(z, band.values, gradient)[0]
        return None, None, None, *of_outputs, *of_parameters


def parts(output: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and rows (of the first spatial axis) of each part: several whole samples, or some rows of one."""
    batch, classes, height, *rest = output.shape
    most = VALUES.get(output.device.type, VALUES_ELSEWHERE) // (classes * prod(rest))
    step = max(1, most // height)
    for first in range(0, batch, step):
        samples = slice(first, min(first + step, batch))
        for top in range(0, height, max(1, most)):
            yield samples, slice(top, min(top + max(1, most), height))


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
        self.rows, self.low = rows, None
        if output.shape[2] != size[0]:
            self._interpolate(output, rows)
        self.values = output[samples, :, self.rows].detach().requires_grad_()

    def _interpolate(self, output: Tensor, rows: slice):
        """As F.interpolate with align_corners=False."""
        height = output.shape[2]
        centres = [max((row + 0.5) * height / self.size[0] - 0.5, 0.0) for row in range(rows.start, rows.stop)]
        low = [int(centre) for centre in centres]
        high = [min(row + 1, height - 1) for row in low]
        self.rows = slice(low[0], high[-1] + 1)
        self.low, self.high = (torch.tensor(r, device=output.device) - low[0] for r in (low, high))
        fractions = [centre - row for centre, row in zip(centres, low, strict=True)]
        self.fraction = output.new_tensor(fractions).view(-1, *[1] * (output.ndim - 3))

    def resampled(self) -> Tensor:
        """``(b, C, n)`` at full resolution, pixels flattened."""
        z = self.values
        if self.low is not None:
            z = torch.lerp(z.index_select(2, self.low), z.index_select(2, self.high), self.fraction)
        rest = self.size[1:]
        if z.shape[3:] != rest:
            mode = "linear" if len(rest) == 1 else "bilinear"
            z = F.interpolate(z.flatten(1, 2), rest, mode=mode, align_corners=False).unflatten(1, z.shape[1:3])
        return z.flatten(2)
