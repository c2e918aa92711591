"""Where maps are supervised: a grid of pixels, every ``stride``-th along each axis, from an offset that moves.

Neighbouring pixels say nearly the same, so a map needs only some of them: Mask2Former (arXiv 2112.01527, section 3)
and PointRend (arXiv 1912.08193) train their mask losses on sampled points. The offset follows from the number of the
training step alone, and ``cycle`` steps in a row use every pixel once.

Resampling an output onto the grid is a small matrix product along each axis. At the pixels of the grid it equals
``F.interpolate`` with ``align_corners=False``. Which offset it is, is decided on the device: no host waits, and a step
that is captured in a CUDA graph moves on, too.
"""

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

Size = tuple[int, ...]


class Offset(NamedTuple):
    """Which pixels the grid has in a step.

    Attributes:
        positions: ``(1, 1, N)``, int64, of its pixels in the flattened finest output; None for all of them.
        inside: ``(1, 1, N)`` of 0 and 1, whether they are inside the image; None if all are.
        axes: the first pixel along each axis, ``(1,)``, int64.
    """

    positions: Tensor | None
    inside: Tensor | None
    axes: Sequence[Tensor]


class Grid:
    """The grid for outputs of some sizes; P is the number of its pixels along an axis, N that of all.

    An axis has the stride if the second output is at most half as long as the first one (rounded up), else 1. Where
    the stride doesn't divide an axis, the last pixel of some offsets is outside the image and doesn't count; it has the
    value of the last one inside.

    Args:
        sizes: spatial sizes of the outputs, finest first.
        stride: of the axes that are thinned out; 1 for every pixel.
        device: of the logits.
        dtype: of the computation.

    Attributes:
        strides: along each axis.
        cycle: number of offsets.
        size: ``[P, …]``.
        is_fine: for each output whether it is as large as the first one.
        coarse: along each axis the lengths of all others.
    """

    def __init__(self, sizes: Sequence[Size], stride: int, device: torch.device, dtype: torch.dtype):
        fine, second = sizes[:2]
        self.dtype = dtype
        self.strides = [min(stride, n) if m < n and 2 * m <= n + 1 else 1 for n, m in zip(fine, second, strict=True)]
        self.cycle = prod(self.strides)
        self.size = [-(-n // s) for n, s in zip(fine, self.strides, strict=True)]
        self.is_fine = [size == fine for size in sizes]
        self.coarse = [[size[axis] for size in sizes if size != fine] for axis in range(len(fine))]
        offsets = list(product(*map(range, self.strides)))
        self.offsets = torch.tensor(offsets).to(device)
        self.positions, self.inside = None, None  # (cycle, 1, N)
        if self.cycle > 1:
            first = torch.cartesian_prod(*(torch.arange(p) * s for p, s in zip(self.size, self.strides, strict=True)))
            length, step = torch.tensor(fine), torch.tensor([prod(fine[axis + 1 :]) for axis in range(len(fine))])
            grids = [first + torch.tensor(offset) for offset in offsets]  # (N, axes)
            self.positions = torch.stack([(at.minimum(length - 1) * step).sum(1) for at in grids])[:, None].to(device)
            if any(p * s > n for p, s, n in zip(self.size, self.strides, fine, strict=True)):
                self.inside = torch.stack([(at < length).all(1) for at in grids])[:, None].to(device, dtype)
        self.matrices = []  # for each axis (stride, P, length of all coarse outputs one after the other)
        for n, s, p, lengths in zip(fine, self.strides, self.size, self.coarse, strict=True):
            pixels = torch.arange(p * s).view(p, s).T  # of each offset
            table = torch.cat([torch.zeros(s, p, 0), *(interpolation(m, n, pixels) for m in lengths)], 2)
            self.matrices.append(table.to(dtype).to(device))
        self.matrices[-1] = self.matrices[-1].mT.contiguous()  # it is multiplied from the right

    def offset(self, step: Tensor | None) -> Offset:
        """That of a training step, whose number is ``()``, int64, on the device; the first one for None."""
        number = self.offsets.new_zeros(()) if step is None else step % self.cycle
        positions, inside = (
            None if table is None else table.index_select(0, number) for table in (self.positions, self.inside)
        )
        return Offset(positions, inside, self.offsets.index_select(0, number).unbind(1))

    def select(self, image: Tensor, offset: Offset) -> Tensor:
        """An image of the finest size, ``(B, C, *spatial)``, at the pixels of the grid, ``(B, C, N)``."""
        image = image.flatten(2)
        return image if offset.positions is None else image.gather(2, offset.positions.expand(*image.shape[:2], -1))

    def slabs(self, outputs: Sequence[Tensor], offset: Offset, rows: int) -> list[tuple[list[Tensor], list[Tensor]]]:
        """What :meth:`scales` needs of the outputs, for slabs of so many rows along the first axis."""
        first, *others = (m.index_select(0, position) for m, position in zip(self.matrices, offset.axes, strict=True))
        pairs = list(zip(outputs, self.is_fine, strict=True))
        fine = [self.select(z, offset).to(self.dtype) for z, is_fine in pairs if is_fine]
        coarse = [z.to(self.dtype) for z, is_fine in pairs if not is_fine]
        selected = zip(*(divide(z, rows * prod(self.size[1:]), 2) for z in fine), strict=True)
        return [
            ([*of_slab, *coarse], [m, *others]) for of_slab, m in zip(selected, divide(first, rows, 1), strict=True)
        ]

    def scales(self, outputs: Sequence[Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
        """The outputs at the n pixels of a slab, each ``(B, C, n)``.

        Args:
            outputs: those of the finest size at these pixels, ``(B, C, n)``, then all others.
            matrices: for each axis ``(1, pixels, length of all coarse outputs)``, for the last one transposed.
        """
        selected = iter(outputs[: sum(self.is_fine)])
        # how many matrices are multiplied at a time; in 3D the rows become further ones
        number = prod(outputs[0].shape[:2])
        axes = []
        for axis, (own, lengths) in enumerate(zip(matrices, self.coarse, strict=True), 1):
            axes.append(own.expand(number, -1, -1).split(lengths, 1 if axis == len(matrices) else 2))
            if axis < len(matrices) - 1:
                number *= own.shape[1]
        coarse = (resample(z, of_z) for z, *of_z in zip(outputs[sum(self.is_fine) :], *axes, strict=True))
        return [next(selected) if is_fine else next(coarse) for is_fine in self.is_fine]


def resample(z: Tensor, matrices: list[Tensor]) -> Tensor:
    """``(B, C, *spatial)`` by one matrix an axis, the last one transposed, to ``(B, C, n)``."""
    batch, classes, *size = z.shape
    *first, last = matrices
    for axis, matrix in enumerate(first):
        z = matrix.bmm(z.reshape(len(matrix), size[axis], -1))
    return z.bmm(last).view(batch, classes, -1)


def divide(tensor: Tensor, size: int, axis: int) -> Sequence[Tensor]:
    """Parts of so many positions along an axis."""
    return (tensor,) if size >= tensor.shape[axis] else tensor.split(size, axis)


def interpolation(coarse: int, fine: int, pixels: Tensor) -> Tensor:
    """The matrices ``(…, coarse)`` in double precision that interpolate an axis at some of its fine pixels, ``(…)``.

    As F.interpolate with align_corners=False has it. Pixels outside are the last one.
    """
    centre = ((pixels.clamp_max(fine - 1).double() + 0.5) * coarse / fine - 0.5).clamp_min(0)
    low = centre.long()
    fraction = (centre - low)[..., None]
    one_hot = torch.eye(coarse, dtype=torch.float64)
    return (1 - fraction) * one_hot[low] + fraction * one_hot[(low + 1).clamp_max(coarse - 1)]
