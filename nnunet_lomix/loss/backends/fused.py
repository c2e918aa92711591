"""Triton: all maps from registers. See :mod:`nnunet_lomix.loss.backends.kernels`.

The convolutions of concat and the scores of fusion are one matrix product. It is computed again in the backward pass,
where the kernel writes the gradients in its place; two more products carry these on to the scales and the parameters.
How many launches and operations there are doesn't depend on the size of a slab; nothing is copied from the host, and
the host waits for nothing. Two runs give the same bits.

Before the kernels are used for a kind of maps they are compared with the plain backend on a small example, so that a
driver or compiler that gets them wrong costs time, not a training.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from itertools import accumulate
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunet_lomix.loss.backends.plain import Case, Plain
from nnunet_lomix.loss.criterion import ClassCriterion, RegionCriterion, Target, full_precision
from nnunet_lomix.loss.maps import ORIGINAL, Map
from nnunet_lomix.loss.operators import Add, Concat, Fusion, LinearOperator, Multiply, Operator, Original

# of the kernels; an original is a sum of one scale
CODES: dict[type[nn.Module], int] = {Original: 0, Add: 0, Multiply: 1, Fusion: 2, Concat: 3}
UNMIXED = 4
MOST_CLASSES = 128
VALUES_OF_WARP = 2**8  # classes × pixels of a block, padded: each lane has 8 of each scale, in as many registers
PROGRAMS = 2**13  # of the forward kernel, side by side: a modern GPU has room for about half of them
# Of a slab, in tensors of the size of the finest output, of a grid and of every pixel. With what isn't in slabs this is
# at most what nnU-Net's own loss takes, 5 of them, and twice that (measured).
MEMORY, MEMORY_OF_EVERY_PIXEL = 3.8, 3.0
LEAST_MEMORY = 2**26  # bytes below which a slab isn't divided
TOLERANCE = 1e-2  # of the comparison with plain, relative to the largest value
logger = logging.getLogger(__name__)


class Fused:
    """Memory: the scales, their gradients, and what is linear, on the grid."""

    def __init__(self, case: Case):
        self.case = case
        self.layout = Layout(case)

    @staticmethod
    def unsupported(case: Case) -> str | None:
        if case.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"Triton has no device {case.device.type!r}"
        if torch.compiler.is_compiling():
            return "torch.compile can't look into its kernels"
        if torch.version.hip:
            return "it was written for NVIDIA's warps, and never tried with ROCm"
        if not has_triton():
            return "Triton is not installed, or older than 3.3"
        if case.dtype != torch.float32:
            return f"the kernels compute in float32, not {case.dtype}"
        if case.num_classes > MOST_CLASSES:
            return f"there are more than {MOST_CLASSES} classes"
        others = {type(o).__name__ for o in case.operators.values() if type(o) not in CODES}
        if others:
            return f"there is no kernel for {', '.join(sorted(others))}"
        return self_check(case)

    def pixels_at_once(self, batch: int, pixels: int, finest: int) -> int:
        classes = self.case.num_classes
        of_pixel = 2 * self.case.num_scales * classes + self.layout.rows
        if 4 * batch * pixels * of_pixel <= LEAST_MEMORY:
            return pixels
        memory = MEMORY_OF_EVERY_PIXEL if pixels == finest else MEMORY
        slabs = ceil(pixels * of_pixel / (memory * finest * classes))
        return -(-pixels // slabs)

    def __call__(self, scales: Sequence[Tensor], target: Target) -> Tensor:
        values = target.y if target.labels is None else target.labels
        z = torch.cat(list(scales), 1)
        sums: Tensor = FusedSums.apply(self.layout, values, target.valid, z, self.layout.matrix())
        return sums


class Layout:
    """What is static for the maps of a case, on its device; L rows of what is linear, K mixed scales.

    Attributes:
        table, ends: see :mod:`nnunet_lomix.loss.backends.kernels`.
        rows: L.
        columns: K C + 1.
        linear: concat and fusion, if they are there.
        chosen: ``(L,)``, which of their rows are used.
        used: ``(L, K C + 1)``, of these rows.
        constants: of a launch.
    """

    def __init__(self, case: Case):
        self.classes, self.maps = case.num_classes, len(case.maps)
        mixed = Operator.count_mixed([m.scales for m in case.maps if m.operator != ORIGINAL])
        self.columns = mixed * self.classes + 1
        self.linear = [o for o in case.operators.values() if isinstance(o, LinearOperator) and o.subsets]
        all_rows = torch.cat([torch.zeros(0, self.columns), *(o.used.flatten(0, 1).cpu() for o in self.linear)])
        chosen = all_rows.any(1)
        self.rows = int(chosen.sum())
        self.chosen, self.used = chosen.nonzero()[:, 0].to(case.device), all_rows[chosen].to(case.device)
        mutants = [Map(n, c) for n, o in case.operators.items() if o in self.linear for c in o.subsets]
        rows_before = torch.cat([torch.zeros(1), chosen.cumsum(0)]).long()
        starts = accumulate((rows for o in self.linear for rows in [o.used.shape[1]] * len(o.subsets)), initial=0)
        first_rows = dict(zip(mutants, rows_before[list(starts)].tolist(), strict=False))
        codes = [
            UNMIXED if m.operator == ORIGINAL and m.scales[0] >= mixed else CODES[type(case.operators[m.operator])]
            for m in case.maps
        ]
        table = [
            (code, m.scales[0] if code == UNMIXED else sum(1 << j for j in m.scales), first_rows.get(m, 0), number)
            for number, (code, m) in enumerate(zip(codes, case.maps, strict=True))
        ]
        ends = list(accumulate(codes.count(code) for code in range(UNMIXED + 1)))
        self.table, self.ends = (
            torch.tensor(numbers, dtype=torch.int32, device=case.device) for numbers in (sorted(table), ends)
        )
        kind = {"REGIONS": isinstance(case.criterion, RegionCriterion), "SQUARED": case.criterion.paper_dice}
        self.constants = {**block_of(self.classes), "K": mixed, **kind}

    def matrix(self) -> Tensor | None:
        """``(L, K C + 1)``, weights and, last, biases; None if there is nothing linear."""
        if not self.linear:
            return None
        return torch.cat([o.weight.flatten(0, 1) for o in self.linear]).index_select(0, self.chosen) * self.used

    def mixed(self, z: Tensor) -> Tensor:
        """``(B, K C, N)``, the mixed scales of ``z (B, S C, N)``."""
        return z.narrow(1, 0, self.columns - 1)

    def product(self, matrix: Tensor | None, z: Tensor) -> Tensor:
        """``linear (B, L, N)``; something else of the device if there is nothing linear."""
        if matrix is None:
            return z
        weight, bias = matrix.split([self.columns - 1, 1], 1)
        return torch.baddbmm(bias, weight.expand(len(z), -1, -1), self.mixed(z))


class FusedSums(torch.autograd.Function):
    """``z (B, S C, N)`` and the matrix of what is linear to the sums of all maps, ``(M, B, 1 + 2 C)``.

    ``values`` are labels or regions, as in the target. The backward pass can't be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any, layout: Layout, values: Tensor, valid: Tensor | None, z: Tensor, matrix: Tensor | None
    ) -> Tensor:
        from nnunet_lomix.loss.backends import kernels  # imports Triton, which not everybody has

        batch, channels, pixels = z.shape
        blocks = -(-pixels // layout.constants["P"])
        parts = max(1, min(blocks, PROGRAMS // (layout.maps * batch)))
        sums = z.new_empty(parts, layout.maps, batch, 1 + 2 * layout.classes)
        with on_device(z.device):
            kernels.forward_kernel[(layout.maps, parts, batch)](
                z, layout.product(matrix, z), *_target(values, valid, z), layout.table, sums,
                layout.classes, pixels, channels // layout.classes, layout.rows, layout.maps,
                **layout.constants, VALID=valid is not None,
            )  # fmt: skip
        ctx.layout = layout
        ctx.save_for_backward(values, valid, z, matrix)
        return sums.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grad_sums.device.type):
            return None, None, None, *FusedSums.gradients(ctx.layout, grad_sums.contiguous(), *ctx.saved_tensors)

    @staticmethod
    def gradients(
        layout: Layout, grad_sums: Tensor, values: Tensor, valid: Tensor | None, z: Tensor, matrix: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Those by ``z`` and by the matrix."""
        from nnunet_lomix.loss.backends import kernels

        batch, channels, pixels = z.shape
        linear, grad_z = layout.product(matrix, z), torch.empty_like(z)
        with on_device(z.device):
            kernels.backward_kernel[(-(-pixels // layout.constants["P"]), batch)](
                z, linear, *_target(values, valid, z), layout.table, layout.ends, grad_sums, grad_z,
                layout.classes, pixels, channels // layout.classes, layout.rows, layout.maps,
                **layout.constants, VALID=valid is not None,
            )  # fmt: skip
        if matrix is None:
            return grad_z, None
        grad_linear = linear  # the kernel has put it there
        layout.mixed(grad_z).baddbmm_(matrix[:, :-1].mT.expand(batch, -1, -1), grad_linear)
        grad_weight = torch.bmm(grad_linear, layout.mixed(z).mT).sum(0)
        return grad_z, torch.cat([grad_weight, grad_linear.sum((0, 2))[:, None]], 1)


def _target(values: Tensor, valid: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, regions and what is valid, contiguous; ``like`` takes the place of what there isn't."""
    values = values.contiguous()
    labels, regions = (like, values) if values.is_floating_point() else (values, like)
    return labels, regions, like if valid is None else valid.contiguous()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A context in which Triton launches on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def has_triton() -> bool:
    """Whether there is a Triton that knows tuples of tensors."""
    try:
        from triton import language
    except Exception:  # whatever a broken installation raises
        return False
    return hasattr(language, "tuple")


REASONS: dict[tuple[object, ...], str | None] = {}  # why the kernels can't be used for a kind of case


def self_check(case: Case) -> str | None:
    """Compare the kernels with the plain backend, once for a kind of case; says what is wrong, if anything."""
    operators = map(type, case.operators.values())
    criterion = type(case.criterion), case.criterion.ignores, case.criterion.paper_dice
    kind = (*case.maps, *operators, case.num_classes, *criterion, case.device)
    if kind not in REASONS:
        try:
            with torch.inference_mode(False), torch.enable_grad():  # a validation may come first
                error = worst_error(case)
            REASONS[kind] = None if error < TOLERANCE else f"the kernels are wrong by up to {error:.1%} on this device"
        except torch.OutOfMemoryError:
            return "there was no memory to try the kernels"
        except Exception as failure:  # whatever a driver or compiler says: training goes on without the kernels
            REASONS[kind] = f"the kernels failed on this device ({type(failure).__name__}: {failure})"
        if REASONS[kind] is not None:
            logger.warning("LoMix: another backend takes the place of 'fused': %s", REASONS[kind])
    return REASONS[kind]


def worst_error(case: Case) -> float:
    """The error of sums and gradients for two random samples, several blocks of pixels each.

    Relative to the largest value of each tensor; NaN if there is one.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*shape, generator=generator)).to(case.device)

    case = case._replace(operators=deepcopy(dict(case.operators)))
    parameters = [p for operator in case.operators.values() for p in operator.parameters() if p.numel()]
    for p in parameters:
        p.data = random(*p.shape, std=0.3)
    classes, pixels = case.num_classes, 2 * block_of(case.num_classes)["P"] + 3
    z = [random(2, classes, pixels).requires_grad_() for _ in range(case.num_scales)]
    if isinstance(case.criterion, ClassCriterion):
        target = torch.randint(classes, (2, 1, pixels), generator=generator).to(case.device)
        if case.criterion.ignore_label is not None:
            target[:, :, ::3] = case.criterion.ignore_label
    else:
        target = random(2, case.criterion.target_channels(classes), pixels) > 0
    errors = []
    for inside in (None, (random(1, 1, pixels) > 0).float()):  # all of an image, or a grid that leaves it
        prepared = case.criterion.prepare(target, classes, torch.float32, inside)
        results = []
        for backend in (Plain(case), Fused(case)):
            sums = backend(z, prepared)
            grads = torch.autograd.grad(sums.square().sum(), [*z, *parameters], materialize_grads=True)
            results.append([sums.detach(), *grads])
        errors += [(a - b).abs().max() / a.abs().max().clamp_min(1e-3) for a, b in zip(*results, strict=True)]
    return float(torch.stack(errors).max())


def block_of(classes: int) -> dict[str, int]:
    """Padded classes and pixels of a block, and the number of warps of a program."""
    padded = 1 << (classes - 1).bit_length()
    return {"BC": padded, "P": VALUES_OF_WARP // padded, "num_warps": 1}
