"""No map exists as a whole: pixels are walked over in parts that fit into the processor's cache, twice.

The forward pass adds up the statistics of all maps part by part and keeps nothing else. The backward pass forms
each map of each part again, takes its gradient from the derivatives by the statistics, and carries it to the outputs,
each at its own resolution, and to the parameters of the operators.
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nnunet_lomix.backends.base import BACKENDS, full_precision
from nnunet_lomix.terms import Statistics

# Values of one map in a part, and of the maps that are treated together: few enough for the cache of a core and
# enough to be worth a call, or enough to keep a GPU busy.
PART, GROUP = {"cpu": 2**15}, {"cpu": 2**17}
PART_ELSEWHERE = GROUP_ELSEWHERE = 2**24


@BACKENDS.register("lean")
def lean(outputs, target, mixers, terms) -> Statistics:
    """Memory: gradients of the outputs, and some values for each pixel of a part, however many maps there are."""
    parameters = [p for mix, _ in mixers for p in mix.parameters()]
    return Statistics(*LeanStatistics.apply(target, mixers, terms, len(outputs), *outputs, *parameters))


class LeanStatistics(torch.autograd.Function):
    """Outputs and parameters of the operators to the statistics of the M maps, ``(M,)`` and twice ``(M, B, C)``."""

    @staticmethod
    def forward(ctx, target, mixers, terms, num_outputs, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.target, ctx.mixers, ctx.terms, ctx.num_outputs = target, mixers, terms, num_outputs
        outputs = tensors[:num_outputs]
        sums = Statistics(
            outputs[0].new_zeros(len(mixers)),
            outputs[0].new_zeros(len(mixers), *outputs[0].shape[:2]),
            outputs[0].new_zeros(len(mixers), *outputs[0].shape[:2]),
        )
        for samples, rows in parts(outputs[0]):
            truth = terms.truth(target, samples, pixels_of(rows, target.size))
            scales = {j: Band(outputs[j], samples, rows, target.size).resampled() for j in used(mixers)}
            for group in groups(mixers, next(iter(scales.values()))):
                s = terms.statistics(mixed(mixers[group], scales), truth)
                sums.cross_entropy[group] += s.cross_entropy
                sums.intersection[group, samples] += s.intersection
                sums.volume[group, samples] += s.volume
        return sums.cross_entropy, sums.intersection, sums.volume

    @staticmethod
    @once_differentiable
    def backward(ctx, by_cross_entropy, by_intersection, by_volume):
        outputs = ctx.saved_tensors[: ctx.num_outputs]
        target, mixers, terms = ctx.target, ctx.mixers, ctx.terms
        of_outputs = [torch.zeros(z.shape, dtype=z.dtype, device=z.device) for z in outputs]
        of_parameters = {p: torch.zeros_like(p) for p in ctx.saved_tensors[ctx.num_outputs :]}
        with full_precision(outputs[0].device.type):
            for samples, rows in parts(outputs[0]):
                truth = terms.truth(target, samples, pixels_of(rows, target.size))
                bands = {j: Band(outputs[j], samples, rows, target.size) for j in used(mixers)}
                with torch.enable_grad():
                    resampled = {j: band.resampled() for j, band in bands.items()}
                scales = {j: z.detach() for j, z in resampled.items()}
                of_scales = {j: torch.zeros_like(z) for j, z in scales.items()}
                for group in groups(mixers, next(iter(scales.values()))):
                    by = Statistics(by_cross_entropy[group], by_intersection[group, samples], by_volume[group, samples])
                    of_maps = terms.gradient(mixed(mixers[group], scales), truth, by)
                    for (mix, subset), of_map in zip(mixers[group], of_maps, strict=True):
                        gradients = mix.pull([scales[j] for j in subset], of_map)
                        sums = [of_scales[j] for j in subset] + [of_parameters[p] for p in mix.parameters()]
                        for total, gradient in zip(sums, gradients, strict=True):
                            total += gradient
                for j, band in bands.items():
                    (gradient,) = torch.autograd.grad(resampled[j], band.values, of_scales[j])
                    of_outputs[j][samples, :, band.rows] += gradient
        return None, None, None, None, *of_outputs, *of_parameters.values()


def mixed(mixers, scales: dict[int, Tensor]) -> Tensor:
    """Some maps ``(M, b, C, n)``."""
    return torch.stack([mix([scales[j] for j in subset]) for mix, subset in mixers])


def groups(mixers, scale: Tensor) -> Iterator[slice]:
    """Maps that are treated together."""
    step = max(1, GROUP.get(scale.device.type, GROUP_ELSEWHERE) // scale.numel())
    return (slice(first, first + step) for first in range(0, len(mixers), step))


def used(mixers) -> list[int]:
    """The outputs that the maps need."""
    return sorted({j for _, subset in mixers for j in subset})


def parts(output: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and rows (of the first spatial axis) of each part: several whole samples, or some rows of one."""
    batch, classes, height, *rest = output.shape
    most = PART.get(output.device.type, PART_ELSEWHERE) // (classes * prod(rest))
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
