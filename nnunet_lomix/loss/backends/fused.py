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
from contextlib import nullcontext
from copy import deepcopy
from itertools import accumulate
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunet_lomix.loss.backends.plain import Case, Plain
from nnunet_lomix.loss.criterion import Target, full_precision
from nnunet_lomix.loss.maps import ORIGINAL
from nnunet_lomix.loss.operators import Add, Concat, Fusion, LinearOperator, Multiply, Original, count_mixed

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
        z, matrix = torch.cat(list(scales), 1), self.layout.matrix()
        sums: Tensor = FusedSums.apply(self.layout, values, target.valid, z, matrix)
        return sums


class Layout:
    """What is static for the maps of a case, on its device; L rows of what is linear, K mixed scales.

    Attributes:
        table, ends: see :mod:`nnunet_lomix.loss.backends.kernels`.
        rows: L.
        columns: K C, of the mixed scales.
        linear: concat and fusion, if they are there.
        chosen: ``(L,)``, which of all of their rows are used.
        used: ``(L, K C + 1)``, of these rows.
        constants: of a launch.
    """

    def __init__(self, case: Case):
        self.classes, self.maps = case.num_classes, len(case.maps)
        mixed = count_mixed([m.scales for m in case.maps if m.operator != ORIGINAL])
        self.columns = mixed * self.classes
        self.linear = [o for o in case.operators.values() if isinstance(o, LinearOperator) and o.subsets]
        used, self.rows, table = [torch.zeros(0, self.columns + 1)], 0, []
        for number, m in enumerate(case.maps):  # those of an operator come in the order of its subsets
            operator = case.operators[m.operator]
            if m.operator == ORIGINAL and m.scales[0] >= mixed:
                table.append((UNMIXED, m.scales[0], 0, number))
                continue
            table.append((CODES[type(operator)], sum(1 << j for j in m.scales), self.rows, number))
            if isinstance(operator, LinearOperator):
                used.append(operator.used[operator.subsets.index(m.scales)].cpu())
                self.rows += int(used[-1].any(1).sum())
        codes = [code for code, *_ in table]
        ends = list(accumulate(codes.count(code) for code in range(UNMIXED + 1)))
        self.table, self.ends = (
            torch.tensor(numbers, dtype=torch.int32, device=case.device) for numbers in (sorted(table), ends)
        )
        chosen = torch.cat(used).any(1)
        self.chosen, self.used = chosen.nonzero()[:, 0].to(case.device), torch.cat(used)[chosen].to(case.device)
        kind = {"REGIONS": case.criterion.regions, "SQUARED": case.criterion.paper_dice}
        self.constants = {**block_of(self.classes), "K": mixed, **kind}

    def matrix(self) -> Tensor | None:
        """``(L, K C + 1)``, weights and, last, biases; None if there is nothing linear."""
        if not self.linear:
            return None
        return torch.cat([o.weight.flatten(0, 1) for o in self.linear]).index_select(0, self.chosen) * self.used

    def product(self, matrix: Tensor | None, z: Tensor) -> Tensor:
        """``linear (B, L, N)``; something else of the device if there is nothing linear."""
        if matrix is None:
            return z
        weight, bias = matrix.split([self.columns, 1], 1)
        return torch.baddbmm(bias, weight.expand(len(z), -1, -1), z.narrow(1, 0, self.columns))

    def launch(
        self, kernel: str, grid: tuple[int, ...], z: Tensor, linear: Tensor, values: Tensor, valid: Tensor | None,
        *others: Tensor,
    ) -> None:  # fmt: skip
        """A kernel, by its name; see there for ``others``."""
        from nnunet_lomix.loss.backends import kernels  # imports Triton, which not everybody has

        values = values.contiguous()
        labels, regions = (z, values) if self.constants["REGIONS"] else (values, z)  # z in place of what there isn't
        counts = z if valid is None else valid.contiguous()
        batch, channels, pixels = z.shape
        with torch.cuda.device(z.device) if z.device.type == "cuda" else nullcontext():
            getattr(kernels, kernel)[grid](
                z, linear, labels, regions, counts, self.table, *others,
                self.classes, pixels, channels // self.classes, self.rows, self.maps,
                **self.constants, VALID=valid is not None,
            )  # fmt: skip


class FusedSums(torch.autograd.Function):
    """``z (B, S C, N)`` and the matrix of what is linear to the sums of all maps, ``(M, B, 1 + 2 C)``.

    ``values`` are labels or regions, as in the target. The backward pass can't be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any, layout: Layout, values: Tensor, valid: Tensor | None, z: Tensor, matrix: Tensor | None
    ) -> Tensor:
        batch, _, pixels = z.shape
        parts = max(1, min(ceil(pixels / layout.constants["P"]), PROGRAMS // (layout.maps * batch)))
        sums = z.new_empty(parts, layout.maps, batch, 1 + 2 * layout.classes)
        grid = layout.maps, parts, batch
        layout.launch("forward_kernel", grid, z, layout.product(matrix, z), values, valid, sums)
        ctx.layout = layout
        ctx.save_for_backward(values, valid, z, matrix)
        return sums.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        values, valid, z, matrix = ctx.saved_tensors
        batch, _, pixels = z.shape
        grid = ceil(pixels / layout.constants["P"]), batch
        grad_z, grad_matrix = torch.empty_like(z), None
        with full_precision(z.device.type):
            linear = layout.product(matrix, z)
            others = layout.ends, grad_sums.contiguous(), grad_z
            layout.launch("backward_kernel", grid, z, linear, values, valid, *others)
            if matrix is not None:
                grad_linear = linear  # the kernel has put it there
                mixed, grad_mixed = (t.narrow(1, 0, layout.columns) for t in (z, grad_z))
                grad_mixed.baddbmm_(matrix[:, :-1].mT.expand(batch, -1, -1), grad_linear)
                grad_weight = torch.bmm(grad_linear, mixed.mT).sum(0)
                grad_matrix = torch.cat([grad_weight, grad_linear.sum((0, 2))[:, None]], 1)
        return None, None, None, grad_z, grad_matrix


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
    criterion = case.criterion.regions, case.criterion.ignores, case.criterion.paper_dice
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
    values, channels = 2 if case.criterion.regions else classes, case.criterion.target_channels(classes)
    target = torch.randint(values, (2, channels, pixels), generator=generator).to(case.device)
    if case.criterion.ignore_label is not None and not case.criterion.regions:
        target[:, :, ::3] = case.criterion.ignore_label
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
