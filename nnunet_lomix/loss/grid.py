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

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, ...]


class Grids:
    """The grids of all offsets; P is the number of their pixels along an axis.

    An axis has the stride if the second output is at most half as long as the first one (rounded up), else 1. Where
    the stride doesn't divide an axis, the last pixel of some offsets is outside the image and doesn't count.

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
        self.padding = [p * s - n for p, s, n in zip(self.size, self.strides, fine, strict=True)]
        self.offsets = torch.tensor(list(product(*map(range, self.strides))), device=device)
        self.matrices = []  # for each axis (stride, P, length of all coarse outputs one after the other)
        for n, s, p, lengths in zip(fine, self.strides, self.size, self.coarse, strict=True):
            empty = torch.zeros(p, 0, dtype=torch.float64)
            pixels = [range(offset, offset + p * s, s) for offset in range(s)]
            table = [torch.cat([empty, *(interpolation(m, n, at) for m in lengths)], 1) for at in pixels]
            self.matrices.append(torch.stack(table).to(dtype).to(device))
        self.matrices[-1] = self.matrices[-1].mT.contiguous()  # it is multiplied from the right

    def at(self, step: Tensor | None) -> "Grid":
        """The grid of a training step, whose number is ``()``, int64, on the device; None for the first offset."""
        return Grid(self, self.offsets.new_zeros(()) if step is None else step % self.cycle)


class Grid:
    """The grid of one step.

    Args:
        grids: those of all offsets.
        number: of the offset, ``()``.
    """

    def __init__(self, grids: Grids, number: Tensor):
        self.grids = grids
        self.offset = grids.offsets.index_select(0, number).unbind(1)  # along each axis, (1,)

    def select(self, image: Tensor) -> Tensor:
        """An image of the finest size, ``(B, C, *spatial)``, at the pixels of the grid, ``(B, C, P, 1, P, 1, …)``.

        Pixels outside the image are 0.
        """
        grids = self.grids
        if any(grids.padding):
            image = F.pad(image, [n for last in reversed(grids.padding) for n in (0, last)])
        pairs = zip(grids.size, grids.strides, strict=True)
        image = image.reshape(*image.shape[:2], *(n for pair in pairs for n in pair))
        for axis, offset in enumerate(self.offset):
            if grids.strides[axis] > 1:
                image = image.index_select(2 * axis + 3, offset)
        return image

    def inside(self, image: Tensor) -> Tensor | None:
        """Which pixels of an image are inside, 0 or 1, as from :meth:`select`; None if all are."""
        if not any(self.grids.padding):
            return None
        return self.select(torch.ones_like(image[:1, :1], dtype=self.grids.dtype))

    def slabs(self, outputs: Sequence[Tensor], rows: int) -> "list[Slab]":
        """The outputs on the grid in slabs of so many rows along the first axis."""
        chosen = zip(self.grids.matrices, self.offset, strict=True)
        first, *others = (matrices.index_select(0, offset) for matrices, offset in chosen)
        pairs = list(zip(outputs, self.grids.is_fine, strict=True))
        fine = [divide(self.select(z).to(self.grids.dtype), rows, 2) for z, is_fine in pairs if is_fine]
        coarse = [z.to(self.grids.dtype) for z, is_fine in pairs if not is_fine]
        parts = zip(zip(*fine, strict=True), divide(first, rows, 1), strict=True)
        return [Slab(self.grids, selected, coarse, [part, *others]) for selected, part in parts]


class Slab:
    """Some rows of a grid.

    Args:
        grids: those of all offsets.
        fine: the outputs of the finest size at its pixels.
        coarse: the other outputs.
        matrices: for each axis ``(1, pixels, length of all coarse outputs)``, for the last one transposed.
    """

    def __init__(self, grids: Grids, fine: Sequence[Tensor], coarse: Sequence[Tensor], matrices: list[Tensor]):
        self.grids = grids
        self.fine = fine
        self.coarse = coarse
        self.matrices = matrices

    def scales(self) -> list[Tensor]:
        """The outputs at the n pixels of the slab, each ``(B, C, n)``."""
        fine = (z.flatten(2) for z in self.fine)
        # how many matrices are multiplied at a time; in 3D the rows become further ones
        number = prod(self.fine[0].shape[:2])
        axes = []
        for axis, (matrices, lengths) in enumerate(zip(self.matrices, self.grids.coarse, strict=True), 1):
            axes.append(matrices.expand(number, -1, -1).split(lengths, 1 if axis == len(self.matrices) else 2))
            if axis < len(self.matrices) - 1:
                number *= matrices.shape[1]
        coarse = (self._resample(z, of_z) for z, *of_z in zip(self.coarse, *axes, strict=True))
        return [next(fine if is_fine else coarse) for is_fine in self.grids.is_fine]

    def _resample(self, z: Tensor, matrices: list[Tensor]) -> Tensor:
        batch, classes, *size = z.shape
        *first, last = matrices
        for axis, matrix in enumerate(first):
            z = matrix.bmm(z.reshape(len(matrix), size[axis], -1))
        return z.bmm(last).view(batch, classes, -1)


def divide(tensor: Tensor, size: int, axis: int) -> Sequence[Tensor]:
    """Parts of so many positions along an axis."""
    return (tensor,) if size >= tensor.shape[axis] else tensor.split(size, axis)


def interpolation(coarse: int, fine: int, pixels: Sequence[int]) -> Tensor:
    """The matrix ``(pixels, coarse)`` in double precision that interpolates an axis at some of its fine pixels.

    As F.interpolate with align_corners=False has it. Pixels outside are the last one.
    """
    centre = ((torch.tensor(pixels).clamp_max(fine - 1).double() + 0.5) * coarse / fine - 0.5).clamp_min(0)
    low = centre.long()
    fraction = (centre - low)[:, None]
    one_hot = torch.eye(coarse, dtype=torch.float64)
    return (1 - fraction) * one_hot[low] + fraction * one_hot[(low + 1).clamp_max(coarse - 1)]
