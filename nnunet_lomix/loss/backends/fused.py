"""Triton: all maps of a block of pixels in registers. See :mod:`nnunet_lomix.loss.backends.kernels`.

The walk over parts, the resampling and the matrix products of concat are those of the lean backend; what else is done
with a piece of a part is different. Not deterministic: sums over blocks are added by atomic operations, in any order.
Before the kernels are used for a kind of maps they are compared with the lean backend on a small example, so that a
driver or compiler that gets them wrong costs time, not a training.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import accumulate, chain

import torch
from torch import Tensor, nn

from nnunet_lomix.loss.backends.banks import Bank
from nnunet_lomix.loss.backends.base import BACKENDS, BoundMap, Case
from nnunet_lomix.loss.backends.lean import LeanEvaluator, walk
from nnunet_lomix.loss.criterion import ClassCriterion, Criterion, PixelSums, RegionCriterion, Target, TargetPart
from nnunet_lomix.loss.operators import Add, Concat, Fusion, Multiply, Original

KINDS = (Original, Add, Multiply, Concat, Fusion)  # in the order of the operators in the kernels
MOST_CLASSES = 128
VALUES_OF_BLOCK = 2**9  # classes × pixels, padded: each lane of a warp has 16 of each scale, in as many registers
VALUES_OF_PIECE = 2**25  # of the maps by concat: an eighth of a gigabyte
WARPS = 1  # of a block: sums over classes and scales need no other warp
TOLERANCE = 1e-2  # of the comparison with lean, relative to the largest value


@BACKENDS.register("fused")
class Fused:
    """Memory: as lean, and VALUES_OF_PIECE."""

    priority = 1

    def unsupported(self, case: Case) -> str | None:
        if case.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"Triton has no device {case.device.type!r}"
        if not has_triton():
            return "Triton is not installed, or older than 3.3"
        if case.dtype != torch.float32:
            return f"the kernels compute in float32, not {case.dtype}"
        if case.shape[1] > MOST_CLASSES:
            return f"there are more than {MOST_CLASSES} classes"
        others = {type(m.operator).__name__ for m in case.maps if type(m.operator) not in KINDS}
        if others:
            return f"there is no kernel for {', '.join(sorted(others))}"
        if torch.are_deterministic_algorithms_enabled():
            return "deterministic algorithms are asked for"
        kinds = tuple(kind for kind in KINDS[1:] if any(type(m.operator) is kind for m in case.maps))
        scales = len({j for m in case.maps for j in m.scales})
        regions = isinstance(case.criterion, RegionCriterion)
        return self_check(kinds, scales, case.shape[1], regions, case.criterion.ignores, case.device)

    def suits(self, case: Case) -> bool:
        return case.device.type == "cuda"

    def __call__(
        self, outputs: Sequence[Tensor], target: Target, maps: Sequence[BoundMap], criterion: Criterion
    ) -> PixelSums:
        return walk(outputs, target, FusedEvaluator(maps, criterion, outputs[0]))


def has_triton() -> bool:
    """Whether there is a Triton that knows tuples of tensors."""
    try:
        from triton import language
    except ImportError:
        return False
    return hasattr(language, "tuple")


@cache
def self_check(
    kinds: tuple[type[nn.Module], ...], scales: int, classes: int, regions: bool, ignore: bool, device: torch.device
) -> str | None:
    """Compare the kernels with the lean backend on a small random example; says what is wrong, if anything."""
    try:
        errors = [worst_error(kinds, scales, classes, regions, ignore, device, odd) for odd in (False, True)]
    except Exception as error:  # whatever a driver or compiler says: training goes on without the kernels
        return f"the kernels failed on this device ({type(error).__name__}: {error})"
    wrong = [f"the kernels are wrong by up to {error:.1%} on this device" for error in errors if not error < TOLERANCE]
    return wrong[0] if wrong else None


def worst_error(
    kinds: tuple[type[nn.Module], ...],
    scales: int,
    classes: int,
    regions: bool,
    ignore: bool,
    device: torch.device,
    odd: bool,
) -> float:
    """The error for a random image of two blocks, of a size that isn't a multiple of 16 if ``odd``.

    Relative to the largest value of each tensor; NaN if there is one.
    """
    pixels = max(16, 3 * VALUES_OF_BLOCK // power_of_two(classes) // 32 * 16) + odd
    generator = torch.Generator().manual_seed(0)
    maps = [BoundMap(Original(), (j,)) for j in range(scales)]
    subsets = {tuple(range(scales)), tuple(range(0, scales, 2)), tuple(range(scales - 1))}
    maps += [BoundMap(kind(classes, len(c)), c) for kind in kinds for c in sorted(subsets) if len(c) > 1]
    for m in maps:
        for p in m.operator.parameters():
            torch.nn.init.normal_(p, std=0.3, generator=generator)
        m.operator.to(device)
    criterion = RegionCriterion(ignore) if regions else ClassCriterion(classes if ignore else None)
    labels = torch.randint(classes + ignore, (2, 1, pixels), generator=generator)
    if regions:
        labels = torch.nn.functional.one_hot(labels[:, 0], criterion.target_channels(classes)).mT
    part = criterion.part(criterion.prepare(labels.to(device), classes, torch.float32))
    z = {j: torch.randn(2, classes, pixels, generator=generator).to(device) for j in range(scales)}
    results: list[list[Tensor]] = []
    for evaluator in (LeanEvaluator(maps, criterion, z[0]), FusedEvaluator(maps, criterion, z[0])):
        sums = evaluator.forward(z, part)
        grad_scales, grad_parameters = evaluator.backward(z, part, sums)
        results.append([*sums, *grad_scales, *grad_parameters])
    errors = [(a - b).abs().max() / a.abs().max().clamp_min(1e-3) for a, b in zip(*results, strict=True)]
    return float(torch.stack(errors).max())


class FusedEvaluator(LeanEvaluator):
    """The sums and gradients of a piece in one kernel each; maps by concat as in the lean backend.

    What the kernels need to know of the maps is sent to the device of ``like`` once for all pieces.
    """

    def __init__(self, maps: Sequence[BoundMap], criterion: Criterion, like: Tensor):
        super().__init__(maps, criterion, like)
        ends = dict(zip(self.numbers_of, accumulate(map(len, self.numbers_of.values())), strict=True))
        ranges = [(ends[kind] - len(self.numbers_of[kind]), ends[kind]) if kind in ends else (0, 0) for kind in KINDS]
        place = {j: i for i, j in enumerate(self.used)}
        subsets = [sum(1 << place[j] for j in maps[i].scales) for i in chain(*self.numbers_of.values())]
        self.table = [torch.tensor(t, dtype=torch.int32, device=like.device) for t in (ranges, subsets)]

    def values_of_piece(self) -> int:
        return VALUES_OF_PIECE

    def _forward_piece(self, z: Tensor, part: TargetPart) -> PixelSums:
        sums = PixelSums.zeros(len(self.maps), z[:1])  # of one sample and C classes
        self._launch("forward_kernel", z, self._concats(z), part, sums)
        return sums

    def _backward_piece(self, z: Tensor, part: TargetPart, grad_sums: PixelSums) -> tuple[Tensor, list[list[Tensor]]]:
        concats, grad_z = self._concats(z), torch.empty_like(z)
        packed: dict[type[nn.Module], list[Tensor]] = {kind: [] for kind in self.numbers_of}
        if Fusion in packed:
            packed[Fusion] = [torch.zeros_like(p) for p in self._parameters(Fusion)]
        grad_fusion = packed.get(Fusion, [z, z])
        grads = [grad.contiguous() for grad in grad_sums]
        self._launch("backward_kernel", z, concats, part, [*grads, grad_z, *grad_fusion])
        if Concat in packed:
            packed[Concat] = self._bank(Concat).backward(z, None, concats, grad_z)
        return grad_z, list(packed.values())

    def _bank(self, kind: type[nn.Module]) -> Bank:
        return self.banks[list(self.numbers_of).index(kind)]

    def _parameters(self, kind: type[nn.Module]) -> list[Tensor]:
        """Weight and bias of R maps as their bank packs them.

        By concat ``(R C, S C)`` and ``(R C,)``, by fusion ``(S, R, C)`` and ``(S, R)``.
        """
        bank = self._bank(kind)
        return [bank.weight, bank.bias[..., 0]]  # type: ignore[attr-defined]

    def _concats(self, z: Tensor) -> Tensor:
        """The maps by concat without their bias, which the kernels add; ``z`` if there are none."""
        if Concat not in self.numbers_of:
            return z
        weight, _ = self._parameters(Concat)
        return (weight @ z.flatten(0, 1)).view(-1, *z.shape[1:])

    def _launch(self, kernel: str, z: Tensor, concats: Tensor, part: TargetPart, more: Iterable[Tensor]) -> None:
        """``z`` takes the place of what a case doesn't have."""
        from nnunet_lomix.loss.backends import kernels  # imports Triton, which not everybody has

        scales, classes, pixels = z.shape
        padded = power_of_two(classes)
        block = VALUES_OF_BLOCK // padded
        regions = isinstance(self.criterion, RegionCriterion)
        tensors = (part.labels, part.y if regions else None, part.valid)
        labels, y, valid = (z if t is None else t.contiguous() for t in tensors)
        concat_b = self._parameters(Concat)[1] if Concat in self.numbers_of else z
        fusion = self._parameters(Fusion) if Fusion in self.numbers_of else [z, z]
        with torch.cuda.device(z.device) if z.is_cuda else nullcontext():
            getattr(kernels, kernel)[(-(-pixels // block),)](
                z, concats, concat_b, labels, y, valid, *self.table, *fusion, *more, classes, pixels,
                S=scales, BC=padded, P=block, REGIONS=regions, VALID=part.valid is not None, num_warps=WARPS,
            )  # fmt: skip


def power_of_two(number: int) -> int:
    """The smallest that is not less."""
    return 1 << (number - 1).bit_length()
