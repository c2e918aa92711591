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
from nnunet_lomix.terms import Statistics, Truth

# Values of one map in a part, and of the maps of small parts that are treated together: few enough for a processor's
# cache and enough to be worth a call (measured), or enough to keep a GPU busy.
VALUES, VALUES_ELSEWHERE = {"cpu": 2**17}, 2**22


@BACKENDS.register("lean")
def lean(outputs, target, mixers, terms) -> Statistics:
    """Memory: gradients of the outputs, and some values for each pixel of a part, however many maps there are."""
    return walk(outputs, target, LeanMaps(mixers, terms))


def walk(outputs, target, maps: "LeanMaps") -> Statistics:
    """The statistics of all maps of the whole target, part by part."""
    return Statistics(*Walk.apply(target, maps, len(outputs), *outputs, *maps.parameters))


class LeanMaps:
    """All maps of a part of b samples and n pixels. ``scales`` are the resampled outputs by index, ``(b, C, n)``.

    Attributes:
        used: the outputs that the maps need.
        parameters: those of the operators.
    """

    def __init__(self, mixers, terms):
        self.mixers = mixers
        self.terms = terms
        self.used = sorted({j for _, subset in mixers for j in subset})
        self.parameters = [p for mix, _ in mixers for p in mix.parameters()]

    def statistics(self, scales: dict[int, Tensor], truth: Truth) -> Statistics:
        """Sums over the pixels of the part, for each map."""
        of_groups = [self.terms.statistics(self._mix(group, scales), truth) for group in self._groups(scales)]
        return Statistics(*(torch.cat([getattr(s, name) for s in of_groups]) for name in vars(of_groups[0])))

    def pull(self, scales: dict[int, Tensor], truth: Truth, by: Statistics) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients by the used scales and by the parameters, where ``by`` are the derivatives by the statistics."""
        of_scales = {j: torch.zeros_like(z) for j, z in scales.items()}
        of_parameters = []
        for group in self._groups(scales):
            by_group = Statistics(by.cross_entropy[group], by.intersection[group], by.volume[group])
            of_maps = self.terms.gradient(self._mix(group, scales), truth, by_group)
            for (mix, subset), of_map in zip(self.mixers[group], of_maps, strict=True):
                gradients = mix.pull([scales[j] for j in subset], of_map)
                for j, gradient in zip(subset, gradients, strict=False):
                    of_scales[j] += gradient
                of_parameters += gradients[len(subset) :]
        return list(of_scales.values()), of_parameters

    def _mix(self, group: slice, scales: dict[int, Tensor]) -> Tensor:
        """Some maps, ``(M, b, C, n)``."""
        return torch.stack([mix([scales[j] for j in subset]) for mix, subset in self.mixers[group]])

    def _groups(self, scales: dict[int, Tensor]) -> Iterator[slice]:
        """Maps that are treated together."""
        scale = next(iter(scales.values()))
        step = max(1, VALUES.get(scale.device.type, VALUES_ELSEWHERE) // scale.numel())
        return (slice(first, first + step) for first in range(0, len(self.mixers), step))


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
