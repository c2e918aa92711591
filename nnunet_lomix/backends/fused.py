"""Triton: all maps of a block of pixels in registers. See :mod:`nnunet_lomix.backends.kernels`.

The walk over parts and the resampling are those of the lean backend; only what is done with a part is different.
Not deterministic: sums over blocks are added by atomic operations, in any order. No GPU has run the kernels yet, so
before they are used for a kind of maps they are compared with the lean backend on a small example.
"""

import os
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from nnunet_lomix.backends.base import BACKENDS, log_once
from nnunet_lomix.backends.lean import LeanMaps, lean, walk
from nnunet_lomix.operators import Add, Concat, Fusion, Multiply, Original
from nnunet_lomix.terms import ClassTerms, RegionTerms, Statistics, Truth

CODES = {Original: 0, Add: 0, Multiply: 1, Concat: 2, Fusion: 3}
MOST_CLASSES = 64
VALUES_OF_BLOCK = 2**12  # scales × classes × pixels, padded: what a program of 8 warps can hold in registers
TOLERANCE = 1e-2  # of the comparison with lean, relative to the largest value


@BACKENDS.register("fused")
def fused(outputs, target, mixers, terms) -> Statistics:
    """Memory: as lean. Falls back to lean, and logs once why, where the kernels don't serve."""
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
    if find_spec("triton") is None:
        return "Triton is not installed"
    if outputs[0].dtype != torch.float32:
        return f"the kernels compute in float32, not {outputs[0].dtype}"
    if outputs[0].shape[1] > MOST_CLASSES:
        return f"there are more than {MOST_CLASSES} classes"
    others = {type(mix).__name__ for mix, _ in mixers if type(mix) not in CODES}
    if others:
        return f"there is no kernel for {', '.join(sorted(others))}"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for"
    # not the maps themselves: a sample of mutants is another one at every step
    kinds = tuple(kind for kind in (Add, Multiply, Concat, Fusion) if any(type(mix) is kind for mix, _ in mixers))
    scales = len({j for _, subset in mixers for j in subset})
    return check(kinds, scales, outputs[0].shape[1], isinstance(terms, RegionTerms), terms.ignores, device)


@cache
def check(
    kinds: tuple[type, ...], scales: int, classes: int, regions: bool, ignore: bool, device: torch.device
) -> str | None:
    """Compare the kernels with the lean backend on a small random example; says what is wrong, if anything."""
    generator = torch.Generator().manual_seed(0)
    mixers = [(Original(), (j,)) for j in range(scales)]
    subsets = {tuple(range(scales)), tuple(range(0, scales, 2)), tuple(range(scales - 1))}
    mixers += [(kind(classes, len(c)), c) for kind in kinds for c in sorted(subsets) if len(c) > 1]
    for mix, _ in mixers:
        for p in mix.parameters():
            torch.nn.init.normal_(p, std=0.3, generator=generator)
        mix.to(device)
    terms = RegionTerms(ignore) if regions else ClassTerms(classes if ignore else None)
    labels = torch.randint(classes + ignore, (2, 1, 9), generator=generator)
    target = torch.nn.functional.one_hot(labels[:, 0], terms.channels(classes)).mT if regions else labels
    truth = terms.truth(terms.prepare(target.to(device), classes, torch.float32))
    z = {j: torch.randn(2, classes, 9, generator=generator).to(device) for j in range(scales)}
    try:
        results = []
        for engine in (LeanMaps(mixers, terms, z[0]), FusedMaps(mixers, terms, z[0])):
            s = engine.statistics(z, truth)
            results.append([*vars(s).values(), *sum(engine.pull(z, truth, s), [])])
        error = difference(*results)
    except Exception as error:  # whatever a driver or compiler says: training goes on without the kernels
        return f"the kernels failed on this device ({type(error).__name__}: {error})"
    return None if error < TOLERANCE else f"the kernels are wrong by up to {error:.1%} on this device"


def difference(trusted: list[Tensor], ours: list[Tensor]) -> float:
    """The largest one, relative to the largest value of its tensor; NaN if there is one."""
    errors = [(a - b).abs().max() / a.abs().max().clamp_min(1e-3) for a, b in zip(trusted, ours, strict=True)]
    return torch.stack(errors).max().item()


class FusedMaps(LeanMaps):
    """The statistics and gradients of a part in one kernel each.

    What the kernels need to know of the maps is sent to the device of ``like`` once for all parts.
    """

    def __init__(self, mixers, terms, like: Tensor):
        super().__init__(mixers, terms, like)
        place = {j: i for i, j in enumerate(self.used)}
        self.operators = [CODES[type(mix)] for mix, _ in mixers]
        self.rows = [self.operators[:i].count(code) for i, code in enumerate(self.operators)]
        self.places = [[place[j] for j in subset] for _, subset in mixers]
        subsets = [sum(1 << p for p in places) for places in self.places]
        self.table = torch.tensor([self.operators, subsets, self.rows], dtype=torch.int32, device=like.device)
        self.packed = self._packed(like)

    def statistics(self, scales, truth) -> Statistics:
        from nnunet_lomix.backends import kernels  # imports Triton, which not everybody has

        z = torch.stack(list(scales.values()))
        sums = Statistics.zeros(len(self.mixers), z[0])
        self._launch(kernels.statistics_kernel, z, truth, list(vars(sums).values()))
        return sums

    def pull(self, scales, truth, by) -> tuple[list[Tensor], list[Tensor]]:
        from nnunet_lomix.backends import kernels

        z = torch.stack(list(scales.values()))
        of_z = torch.empty_like(z)
        of_packed = [torch.zeros_like(p) for p in self.packed]
        by = [b.contiguous() for b in vars(by).values()]
        self._launch(kernels.gradient_kernel, z, truth, [*by, of_z, *of_packed])
        return list(of_z), self._unpacked(of_packed)

    def _launch(self, kernel, z: Tensor, truth: Truth, more: list[Tensor]):
        scales, batch, classes, pixels = z.shape
        padded_scales = power_of_two(scales)
        padded_classes = max(16, power_of_two(classes))  # a matrix product has at least 16 rows
        block = max(16, VALUES_OF_BLOCK // (padded_scales * padded_classes))
        regions = isinstance(self.terms, RegionTerms)
        labels, y, valid = (
            z if t is None else t.contiguous() for t in (truth.labels, truth.y if regions else None, truth.valid)
        )
        with torch.cuda.device(z.device) if z.is_cuda else nullcontext():
            kernel[(-(-pixels // block), batch)](
                z, labels, y, valid, *self.table, *self.packed, *more, len(self.mixers), batch, classes, pixels, scales,
                SP=padded_scales, BC=padded_classes, P=block, REGIONS=regions, VALID=truth.valid is not None,
                num_warps=8,
            )  # fmt: skip

    def _packed(self, like: Tensor) -> list[Tensor]:
        """Weights, biases of concat ``(R, C, S, C)``, ``(R, C)`` and fusion ``(R, S, C)``, ``(R, S)``, padded by 0."""
        scales, classes = len(self.used), like.shape[1]
        concat, fusion = (max(1, self.operators.count(CODES[o])) for o in (Concat, Fusion))
        shapes = (concat, classes, scales, classes), (concat, classes), (fusion, scales, classes), (fusion, scales)
        packed = [like.new_zeros(shape) for shape in shapes]
        for (mix, _), row, places in zip(self.mixers, self.rows, self.places, strict=True):
            if type(mix) is Concat:
                packed[0][row][:, places] = mix.weight.detach().unflatten(1, (len(places), classes))
                packed[1][row] = mix.bias.detach()[:, 0]
            elif type(mix) is Fusion:
                packed[2][row, places] = mix.weight.detach()[:, 0]
                packed[3][row, places] = mix.bias.detach()
        return packed

    def _unpacked(self, packed: list[Tensor]) -> list[Tensor]:
        """The same for each parameter."""
        result = []
        for (mix, _), row, places in zip(self.mixers, self.rows, self.places, strict=True):
            if type(mix) is Concat:
                result += [packed[0][row][:, places].flatten(1), packed[1][row][:, None]]
            elif type(mix) is Fusion:
                result += [packed[2][row, places][:, None], packed[3][row, places]]
        return result


def power_of_two(number: int) -> int:
    """The smallest that is not less."""
    return 1 << (number - 1).bit_length()
