"""Triton: all maps of a block of pixels in registers. See :mod:`nnunet_lomix.loss.backends.kernels`.

The coarser outputs are interpolated to full resolution; then one kernel takes the whole batch forward. Backward
another one puts the gradients in their place, and a third one brings these back to the outputs, an axis at a time. With
more than three coarser outputs that happens in two turns, each with half of the batch, to save memory. How many
launches, copies and additions there are doesn't depend on the size of the images; nothing is copied from the host, and
the host waits for nothing. What is static for the maps and shapes is made once and kept.

Two runs give the same bits. Before the kernels are used for a kind of maps they are compared with the lean backend on a
small example, so that a driver or compiler that gets them wrong costs time, not a training.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunet_lomix.loss.backends.base import BACKENDS, BoundMap, Case, resample
from nnunet_lomix.loss.backends.lean import Lean
from nnunet_lomix.loss.criterion import (
    ClassCriterion,
    Criterion,
    PixelSums,
    RegionCriterion,
    Target,
    TargetSums,
)
from nnunet_lomix.loss.operators import Add, Concat, Fusion, Multiply, Original

KINDS = (Original, Add, Multiply, Concat, Fusion)  # in the order of the operators in the kernels
MOST_CLASSES = 128
VALUES_OF_WARP = 2**9  # classes × pixels of a block, padded: each lane has 16 of each scale, in as many registers
LEAST_PIXELS = 16  # of a block: what a product of matrices takes
PROGRAMS = 2**11  # side by side: a modern GPU has room for so many warps with as many registers as they can have
LEAST_ROWS, MOST_ROWS = 2**22, 2**24  # values in the rows of all programs; between these as many as in z_0
COARSE_AT_ONCE = 3  # coarser outputs that lie in memory at full resolution at a time, for the whole batch
VALUES_OF_ADJOINT = 2**9  # of a program
TOLERANCE = 1e-2  # of the comparison with lean, relative to the largest value
logger = logging.getLogger(__name__)


@BACKENDS.register("fused")
class Fused:
    """Memory: up to COARSE_AT_ONCE outputs at full resolution, and the rows of the programs."""

    priority = 3

    def __init__(self, programs: int = PROGRAMS) -> None:
        self._programs = programs
        self._layouts: dict[tuple[object, ...], Layout] = {}

    def unsupported(self, case: Case) -> str | None:
        if case.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"Triton has no device {case.device.type!r}"
        if not has_triton():
            return "Triton is not installed, or older than 3.3"
        if case.dtype != torch.float32:
            return f"the kernels compute in float32, not {case.dtype}"
        if case.shape[1] > MOST_CLASSES:
            return f"there are more than {MOST_CLASSES} classes"
        if prod(case.shape[1:]) >= 2**31:
            return "a sample has 2^31 values or more"
        others = {type(m.operator).__name__ for m in case.maps if type(m.operator) not in KINDS}
        if others:
            return f"there is no kernel for {', '.join(sorted(others))}"
        kinds = tuple(kind for kind in KINDS[1:] if any(type(m.operator) is kind for m in case.maps))
        scales = max(j for m in case.maps for j in m.scales) + 1
        regions = isinstance(case.criterion, RegionCriterion)
        _, classes, *size = case.shape
        return self_check(kinds, scales, classes, len(size), regions, case.criterion.ignores, case.device)

    def suits(self, case: Case) -> bool:
        return case.device.type == "cuda"

    def __call__(
        self,
        outputs: Sequence[Tensor],
        target: Target,
        maps: Sequence[BoundMap],
        criterion: Criterion,
        chosen: Tensor | None = None,
    ) -> tuple[PixelSums, TargetSums]:
        layout = self._layout(outputs, target, maps, criterion)
        table = layout.table if chosen is None else layout.choose(chosen)
        parameters = [p for m in maps for p in m.operator.parameters()]
        sums, sums_of_target = FusedSums.apply(layout, table, target, len(outputs), *outputs, *parameters)
        classes = target.num_classes
        pixel_sums = PixelSums(
            sums[..., 0].sum(0), sums[..., 1 : 1 + classes].transpose(0, 1), sums[..., 1 + classes :].transpose(0, 1)
        )
        return pixel_sums, TargetSums(sums_of_target[:, 0].sum(), sums_of_target[:, 1 + classes :])

    def _layout(
        self, outputs: Sequence[Tensor], target: Target, maps: Sequence[BoundMap], criterion: Criterion
    ) -> "Layout":
        z_0 = outputs[0]
        key = (*(z.shape for z in outputs), z_0.device, *((type(m.operator), m.scales) for m in maps))
        if key not in self._layouts:
            self._layouts[key] = Layout(outputs, target, maps, criterion, self._programs)
        return self._layouts[key]


class Table(NamedTuple):
    """Which maps the kernels evaluate, M of them, in an order in which those of an operator follow each other.

    Attributes:
        ranges, subsets, offsets: int32, see :mod:`nnunet_lomix.loss.backends.kernels`.
        places: ``(M,)``, for each map in the order of the caller its place among those evaluated.
        evaluated: ``(M,)``, the other way round.
    """

    ranges: Tensor
    subsets: Tensor
    offsets: Tensor
    places: Tensor
    evaluated: Tensor


class Layout:
    """What is static for the maps and the shapes, on the device of the outputs.

    Attributes:
        table: of all maps.
        shapes: depth, height and width of each output.
        block: the constants of a launch.
        samples: which the kernels treat so many of at a time.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        target: Target,
        maps: Sequence[BoundMap],
        criterion: Criterion,
        most_programs: int,
    ):
        z_0 = outputs[0]
        self.most_programs = most_programs
        self.device, self.batch, self.classes = z_0.device, z_0.shape[0], z_0.shape[1]
        self.pixels = prod(target.size)
        sizes = [(1, *z.shape[2:])[-3:] for z in outputs]
        self.shapes = sizes

        kinds = [KINDS.index(type(m.operator)) for m in maps]
        order = sorted(range(len(maps)), key=kinds.__getitem__)
        counts = [kinds.count(kind) for kind in range(len(KINDS))]
        ends = list(accumulate(counts))
        numbers = [sum(p.numel() for p in m.operator.parameters()) for m in maps]
        offsets = [end - number for end, number in zip(accumulate(numbers), numbers, strict=True)]
        self.parameters = sum(numbers)
        self.row = -(-max(1, self.parameters) // 4) * 4  # of gradients, padded so that all rows are aligned
        evaluated = torch.tensor(order, device=self.device)
        self.table = Table(
            self._tensor([(end - count, end) for end, count in zip(ends, counts, strict=True)]),
            self._tensor([sum(1 << j for j in maps[i].scales) for i in order]),
            self._tensor([offsets[i] for i in order]),
            evaluated.argsort(),
            evaluated,
        )

        self.block = {
            **block_of(self.classes),
            "S": len(outputs),
            "REGIONS": isinstance(criterion, RegionCriterion),
            "VALID": criterion.ignores,
        }
        turns = -(-(len(outputs) - 1) // COARSE_AT_ONCE)
        self.samples = -(-self.batch // turns)

    def _tensor(self, numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    def choose(self, chosen: Tensor) -> Table:
        """The table of some maps, also the same one twice, given by their numbers; made on the device."""
        places_of_all, evaluated = self.table.places[chosen].sort()
        starts_and_ends = torch.searchsorted(places_of_all, self.table.ranges.long())
        return Table(
            starts_and_ends.int(),
            self.table.subsets[places_of_all],
            self.table.offsets[places_of_all],
            evaluated.argsort(),
            evaluated,
        )

    def programs(self, samples: int, row: int) -> int:
        """How many programs share a sample, each with a row of so many values, where so many samples go together."""
        blocks = -(-self.pixels // int(self.block["P"]))
        values = min(MOST_ROWS, max(LEAST_ROWS, self.batch * self.classes * self.pixels))
        return max(1, min(blocks, self.most_programs // samples, values // (row * self.batch)))

    def turns(self) -> Iterator[tuple[int, int]]:
        """First sample and number of samples of each turn."""
        for first in range(0, self.batch, self.samples):
            yield first, min(self.samples, self.batch - first)


class FusedSums(torch.autograd.Function):
    """Outputs and parameters of the operators to the sums of the M maps and of the target.

    ``(B, M, 2 C + 1)``: cross-entropy, intersections and volumes. ``(B, 2 C + 1)``: number of valid pixels, zeros, and
    volumes.
    """

    @staticmethod
    def forward(
        ctx: Any, layout: Layout, table: Table, target: Target, num_outputs: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        from nnunet_lomix.loss.backends import kernels  # imports Triton, which not everybody has

        outputs = tuple(z.contiguous() for z in tensors[:num_outputs])
        parameters = _flatten(tensors[num_outputs:], outputs[0])
        maps, row = len(table.subsets), 2 * layout.classes + 1
        programs = layout.programs(layout.samples, (maps + 1) * row)
        rows = outputs[0].new_zeros(layout.batch, programs, maps + 1, row)
        with _on(layout.device):
            for first, samples in layout.turns():
                kernels.forward_kernel[(programs, samples)](
                    _resample(outputs, slice(first, first + samples), target.size), first,
                    *_target(target, outputs[0]), *table[:3], parameters, rows[first:],
                    layout.classes, layout.pixels, maps, **layout.block,
                )  # fmt: skip
        sums = rows.sum(1)
        ctx.save_for_backward(*outputs, *tensors[num_outputs:])
        ctx.layout, ctx.table, ctx.target, ctx.num_outputs = layout, table, target, num_outputs
        sums_of_target = sums[:, maps]
        ctx.mark_non_differentiable(sums_of_target)
        return sums[:, :maps].index_select(1, table.places), sums_of_target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        from nnunet_lomix.loss.backends import kernels

        layout, table, target = ctx.layout, ctx.table, ctx.target
        outputs, tensors = ctx.saved_tensors[: ctx.num_outputs], ctx.saved_tensors[ctx.num_outputs :]
        parameters = _flatten(tensors, outputs[0])
        grad_sums = grad_sums.index_select(1, table.evaluated)
        grad_outputs = tuple(torch.empty_like(z) for z in outputs)
        programs = layout.programs(layout.samples, layout.row)
        rows = outputs[0].new_zeros(layout.batch, programs, layout.row)
        with _on(layout.device):
            for first, samples in layout.turns():
                turn = slice(first, first + samples)
                resampled = _resample(outputs, turn, target.size)
                kernels.backward_kernel[(programs, samples)](
                    resampled, first, *_target(target, outputs[0]), *table[:3], parameters, grad_sums,
                    grad_outputs[0][turn], rows[turn],
                    layout.classes, layout.pixels, len(table.subsets), layout.row, **layout.block,
                )  # fmt: skip
                for j in range(1, len(outputs)):  # the kernel has put the gradients in place of the scales
                    _resample_backward(resampled[j], grad_outputs[j][turn], layout.shapes[0], layout.shapes[j])
                del resampled  # before those of the next turn are made
        grad_row = rows.sum((0, 1))[: layout.parameters]
        grad_parameters = grad_row.split([p.numel() for p in tensors]) if tensors else ()
        return (
            *(None, None, None, None),
            *grad_outputs,
            *(grad.view_as(p) for grad, p in zip(grad_parameters, tensors, strict=True)),
        )


def _resample(outputs: Sequence[Tensor], samples: slice, size: torch.Size) -> tuple[Tensor, ...]:
    """The scales of some samples, ``(b, C, N)``; all but the first are in memory of their own, contiguous."""
    z_0, *coarser = (z[samples] for z in outputs)
    return (z_0, *(resample(z, size).clone() if z.shape[2:] == size else resample(z, size) for z in coarser))


def _resample_backward(grad: Tensor, grad_output: Tensor, fine: Sequence[int], coarse: Sequence[int]) -> None:
    """The gradient by an output ``(b, C, *coarse)`` from that by its interpolation ``(b, C, N)``, an axis at a time."""
    from nnunet_lomix.loss.backends import kernels

    axes = [axis for axis in (2, 1, 0) if fine[axis] != coarse[axis]]
    if not axes:
        grad_output.copy_(grad.view_as(grad_output))
    shape = list(fine)
    for axis in axes:
        shape[axis] = coarse[axis]
        number = grad.shape[0] * grad.shape[1] * prod(shape)
        new = grad_output if axis == axes[-1] else grad.new_empty(*grad.shape[:2], prod(shape))
        # a coarse position has fewer than two fine ones on either side of it, for each that lies between two of them
        span = -(-2 * fine[axis] // coarse[axis]) + 2
        kernels.adjoint_kernel[(-(-number // VALUES_OF_ADJOINT),)](
            grad, new, coarse[axis], fine[axis], prod(shape[axis + 1 :]), number, span, P=VALUES_OF_ADJOINT, num_warps=4
        )
        grad = new


def _flatten(parameters: Sequence[Tensor], like: Tensor) -> Tensor:
    """All parameters in one row; something else of the device if there are none."""
    return torch.cat([p.detach().flatten() for p in parameters]) if parameters else like


def _target(target: Target, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, regions and what is valid; ``like`` takes the place of what there isn't."""
    values = target.values.contiguous()
    regions = values.is_floating_point()
    valid = like if target.valid is None else target.valid.contiguous()
    return (like, values, valid) if regions else (values, like, valid)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def has_triton() -> bool:
    """Whether there is a Triton that knows tuples of tensors."""
    try:
        from triton import language
    except Exception:  # whatever a broken installation raises
        return False
    return hasattr(language, "tuple")


@cache
def self_check(
    kinds: tuple[type[nn.Module], ...],
    scales: int,
    classes: int,
    dimensions: int,
    regions: bool,
    ignore: bool,
    device: torch.device,
) -> str | None:
    """Compare the kernels with the lean backend on a small random example; says what is wrong, if anything."""
    try:
        error = worst_error(kinds, scales, classes, dimensions, regions, ignore, device)
        reason = None if error < TOLERANCE else f"the kernels are wrong by up to {error:.1%} on this device"
    except Exception as failure:  # whatever a driver or compiler says: training goes on without the kernels
        reason = f"the kernels failed on this device ({type(failure).__name__}: {failure})"
    if reason is not None:
        logger.warning("LoMix: another backend takes the place of 'fused': %s", reason)
    return reason


def worst_error(
    kinds: tuple[type[nn.Module], ...],
    scales: int,
    classes: int,
    dimensions: int,
    regions: bool,
    ignore: bool,
    device: torch.device,
) -> float:
    """The error for two random images, with outputs of odd sizes, all maps and then some of them, one of these twice.

    Two programs share an image, so that each adds several blocks to its row. Relative to the largest value of each
    tensor; NaN if there is one.
    """
    generator = torch.Generator().manual_seed(0)
    size = (*[3] * (dimensions - 1), block_of(classes)["P"] + 3)
    sizes = [tuple(max(1, -(-n // (j + 1))) for n in size) for j in range(scales)]
    z = [torch.randn(2, classes, *s, generator=generator).to(device).requires_grad_() for s in sizes]
    subsets = {tuple(range(scales)), tuple(range(0, scales, 2)), tuple(range(scales - 1))}
    maps = [BoundMap(Original(), (j,)) for j in range(scales)]
    maps += [BoundMap(kind(classes, len(c)), c) for kind in kinds for c in sorted(subsets) if len(c) > 1]
    for m in maps:
        for p in m.operator.parameters():
            torch.nn.init.normal_(p, std=0.3, generator=generator)
        m.operator.to(device)
    criterion = RegionCriterion(ignore) if regions else ClassCriterion(classes if ignore else None)
    labels = torch.randint(classes + ignore, (2, 1, *size), generator=generator)
    if regions:
        labels = torch.nn.functional.one_hot(labels[:, 0], criterion.target_channels(classes)).movedim(-1, 1)
    target = criterion.prepare(labels.to(device), classes, torch.float32)
    leaves = [*z, *(p for m in maps for p in m.operator.parameters())]
    results: list[list[Tensor]] = []
    some = torch.tensor([*range(scales), len(maps) - 1, len(maps) - 1], device=device)
    for backend in (Lean(), Fused(programs=4)):
        tensors: list[Tensor] = []
        for chosen in (None, some):
            with torch.enable_grad():
                sums, target_sums = backend(z, target, maps, criterion, chosen)
                value = sum(((s * s.detach()).sum() for s in sums), start=torch.zeros((), device=device))
                grads = torch.autograd.grad(value, leaves, materialize_grads=True)
            tensors += [*(s.detach() for s in sums), *target_sums, *grads]
        results.append(tensors)
    errors = [(a - b).abs().max() / a.abs().max().clamp_min(1e-3) for a, b in zip(*results, strict=True)]
    return float(torch.stack(errors).max())


def block_of(classes: int) -> dict[str, int]:
    """Padded classes and pixels of a block, and the number of warps of a program."""
    padded = power_of_two(classes)
    pixels = max(LEAST_PIXELS, VALUES_OF_WARP // padded)
    return {"BC": padded, "P": pixels, "num_warps": max(1, padded * pixels // VALUES_OF_WARP)}


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
