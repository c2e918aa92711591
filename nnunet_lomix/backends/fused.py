"""Triton: all maps of a block of pixels in registers. See :mod:`nnunet_lomix.backends.kernels`.

The walk over parts, the resampling and the matrix products of concat are those of the lean backend; what else is done
with a piece of a part is different. Not deterministic: sums over blocks are added by atomic operations, in any order.
No GPU has run the kernels yet, so before they are used for a kind of maps they are compared with the lean backend on a
small example.
"""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache
from itertools import accumulate, chain

import torch
from torch import Tensor

from nnunet_lomix.backends.banks import Bank
from nnunet_lomix.backends.base import BACKENDS, log_once
from nnunet_lomix.backends.lean import LeanMaps, lean, walk
from nnunet_lomix.operators import Add, Concat, Fusion, Multiply, Original
from nnunet_lomix.terms import ClassTerms, RegionTerms, Statistics, Truth

KINDS = Original, Add, Multiply, Concat, Fusion  # in the order of the operators in the kernels
MOST_CLASSES = 128
VALUES_OF_BLOCK = 2**9  # classes × pixels, padded: each lane of a warp has 16 of each scale, in as many registers
VALUES_OF_PIECE = 2**25  # of the maps by concat: an eighth of a gigabyte
WARPS = 1  # of a block: sums over classes and scales need no other warp
TOLERANCE = 1e-2  # of the comparison with lean, relative to the largest value


@BACKENDS.register("fused")
def fused(outputs, target, mixers, terms) -> Statistics:
    """Memory: as lean, and VALUES_OF_PIECE. Falls back to lean, and logs once why, where the kernels don't serve."""
    why = unsupported(outputs, mixers, terms)
    if why:
        log_once(f"LoMix: the backend 'lean' takes the place of 'fused': {why}")
        return lean(outputs, target, mixers, terms)
    return walk(outputs, target, FusedMaps(mixers, terms, outputs[0]))


def unsupported(outputs, mixers, terms) -> str | None:
    """Why the kernels can't be used, or None if they can."""
    device = outputs[0].device
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton has no device {device.type!r}"
    if not has_triton():
        return "Triton is not installed, or older than 3.3"
    if outputs[0].dtype != torch.float32:
        return f"the kernels compute in float32, not {outputs[0].dtype}"
    if outputs[0].shape[1] > MOST_CLASSES:
        return f"there are more than {MOST_CLASSES} classes"
    others = {type(mix).__name__ for mix, _ in mixers if type(mix) not in KINDS}
    if others:
        return f"there is no kernel for {', '.join(sorted(others))}"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for"
    # not the maps themselves: a sample of mutants is another one at every step
    kinds = tuple(kind for kind in (Add, Multiply, Concat, Fusion) if any(type(mix) is kind for mix, _ in mixers))
    scales = len({j for _, subset in mixers for j in subset})
    return check(kinds, scales, outputs[0].shape[1], isinstance(terms, RegionTerms), terms.ignores, device)


def has_triton() -> bool:
    """Whether there is a Triton that knows tuples of tensors."""
    try:
        from triton import language
    except ImportError:
        return False
    return hasattr(language, "tuple")


@cache
def check(
    kinds: tuple[type, ...], scales: int, classes: int, regions: bool, ignore: bool, device: torch.device
) -> str | None:
    """Compare the kernels with the lean backend on a small random example; says what is wrong, if anything."""
    try:
        errors = [compare(kinds, scales, classes, regions, ignore, device, odd) for odd in (False, True)]
    except Exception as error:  # whatever a driver or compiler says: training goes on without the kernels
        return f"the kernels failed on this device ({type(error).__name__}: {error})"
    wrong = [f"the kernels are wrong by up to {error:.1%} on this device" for error in errors if not error < TOLERANCE]
    return wrong[0] if wrong else None


def compare(kinds, scales: int, classes: int, regions: bool, ignore: bool, device: torch.device, odd: bool) -> float:
    """The error for a random image of two blocks, of a size that isn't a multiple of 16 if ``odd``."""
    pixels = max(16, 3 * VALUES_OF_BLOCK // power_of_two(classes) // 32 * 16) + odd
    generator = torch.Generator().manual_seed(0)
    mixers = [(Original(), (j,)) for j in range(scales)]
    subsets = {tuple(range(scales)), tuple(range(0, scales, 2)), tuple(range(scales - 1))}
    mixers += [(kind(classes, len(c)), c) for kind in kinds for c in sorted(subsets) if len(c) > 1]
    for mix, _ in mixers:
        for p in mix.parameters():
            torch.nn.init.normal_(p, std=0.3, generator=generator)
        mix.to(device)
    terms = RegionTerms(ignore) if regions else ClassTerms(classes if ignore else None)
    labels = torch.randint(classes + ignore, (2, 1, pixels), generator=generator)
    target = torch.nn.functional.one_hot(labels[:, 0], terms.channels(classes)).mT if regions else labels
    truth = terms.truth(terms.prepare(target.to(device), classes, torch.float32))
    z = {j: torch.randn(2, classes, pixels, generator=generator).to(device) for j in range(scales)}
    results = []
    for engine in (LeanMaps(mixers, terms, z[0]), FusedMaps(mixers, terms, z[0])):
        s = engine.statistics(z, truth)
        results.append([*vars(s).values(), *sum(engine.pull(z, truth, s), [])])
    return difference(*results)


def difference(trusted: list[Tensor], ours: list[Tensor]) -> float:
    """The largest one, relative to the largest value of its tensor; NaN if there is one."""
    errors = [(a - b).abs().max() / a.abs().max().clamp_min(1e-3) for a, b in zip(trusted, ours, strict=True)]
    return torch.stack(errors).max().item()


class FusedMaps(LeanMaps):
    """The statistics and gradients of a piece in one kernel each; maps by concat as in the lean backend.

    What the kernels need to know of the maps is sent to the device of ``like`` once for all pieces.
    """

    def __init__(self, mixers, terms, like: Tensor):
        super().__init__(mixers, terms, like)
        ends = dict(zip(self.kinds, accumulate(map(len, self.kinds.values())), strict=True))
        ranges = [(ends[kind] - len(self.kinds[kind]), ends[kind]) if kind in ends else (0, 0) for kind in KINDS]
        place = {j: i for i, j in enumerate(self.used)}
        subsets = [sum(1 << place[j] for j in mixers[i][1]) for i in chain(*self.kinds.values())]
        self.table = [torch.tensor(t, dtype=torch.int32, device=like.device) for t in (ranges, subsets)]

    def values_of_piece(self):
        return VALUES_OF_PIECE

    def statistics_of_piece(self, z, truth):
        sums = Statistics.zeros(len(self.mixers), z[:1])  # of one sample and C classes
        self._launch("statistics_kernel", z, self._concats(z), truth, vars(sums).values())
        return sums

    def pull_piece(self, z, truth, by):
        concats, of_z = self._concats(z), torch.empty_like(z)
        packed = {kind: [] for kind in self.kinds}
        if Fusion in packed:
            packed[Fusion] = [torch.zeros_like(p) for p in self._parameters(Fusion)]
        of_fusion = packed.get(Fusion, [z, z])
        self._launch("gradient_kernel", z, concats, truth, [*vars(by).values(), of_z, *of_fusion])
        if Concat in packed:
            packed[Concat] = self._bank(Concat).pull(z, None, concats, of_z)
        return of_z, [*packed.values()]

    def _bank(self, kind: type) -> Bank:
        return self.banks[[*self.kinds].index(kind)]

    def _parameters(self, kind: type) -> list[Tensor]:
        """Weight and bias of R maps as their bank packs them.

        By concat ``(R C, S C)`` and ``(R C,)``, by fusion ``(S, R, C)`` and ``(S, R)``.
        """
        bank = self._bank(kind)
        return [bank.weight, bank.bias[..., 0]]

    def _concats(self, z: Tensor) -> Tensor:
        """The maps by concat without their bias, which the kernels add; ``z`` if there are none."""
        if Concat not in self.kinds:
            return z
        return (self._bank(Concat).weight @ z.flatten(0, 1)).view(-1, *z.shape[1:])

    def _launch(self, kernel: str, z: Tensor, concats: Tensor, truth: Truth, more: Iterable[Tensor]):
        """``z`` takes the place of what a case doesn't have."""
        from nnunet_lomix.backends import kernels  # imports Triton, which not everybody has

        scales, classes, pixels = z.shape
        padded = power_of_two(classes)
        block = VALUES_OF_BLOCK // padded
        regions = isinstance(self.terms, RegionTerms)
        tensors = (truth.labels, truth.y if regions else None, truth.valid)
        labels, y, valid = (z if t is None else t.contiguous() for t in tensors)
        _, concat_b = self._parameters(Concat) if Concat in self.kinds else (z, z)
        fusion = self._parameters(Fusion) if Fusion in self.kinds else (z, z)
        with torch.cuda.device(z.device) if z.is_cuda else nullcontext():
            getattr(kernels, kernel)[(-(-pixels // block),)](
                z, concats, concat_b, labels, y, valid, *self.table, *fusion, *more, classes, pixels,
                S=scales, BC=padded, P=block, REGIONS=regions, VALID=truth.valid is not None, num_warps=WARPS,
            )  # fmt: skip


def power_of_two(number: int) -> int:
    """The smallest that is not less."""
    return 1 << (number - 1).bit_length()
