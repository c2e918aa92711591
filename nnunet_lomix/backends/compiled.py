"""The lean backend with its work on the values of a piece compiled by ``torch.compile``: fewer passes over them.

What takes most of the time, that is the statistics, their gradient and fusion, is compiled; products of matrices and
sums are as fast without. Numbers of maps and pixels may change without compiling again, but for few special values.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from nnunet_lomix.backends.banks import BANKS, Fusions
from nnunet_lomix.backends.base import BACKENDS, log_once
from nnunet_lomix.backends.lean import LeanMaps, walk
from nnunet_lomix.operators import Fusion
from nnunet_lomix.terms import Statistics

failed = set()  # functions that couldn't be compiled: after the first one nothing is


@BACKENDS.register("compiled")
def compiled(outputs, target, mixers, terms) -> Statistics:
    """Memory: as lean. Falls back to lean, and logs once why, if compiling fails."""
    if not failed:
        log_once("LoMix: the loss is compiled; its first step takes longer, 20 s or so (nnUNet_compile=f avoids it)")
    maps = LeanMaps if failed else CompiledMaps
    return walk(outputs, target, maps(mixers, terms, outputs[0]))


@cache
def compile_once(function: Callable) -> Callable:
    """``function``, compiled at its first call; itself, if that fails."""
    fast = torch.compile(function, dynamic=True, fullgraph=True)

    def call(*args):
        if failed:
            return function(*args)
        # no views, else each shape of what they are views of is compiled by itself
        args = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        try:
            return fast(*args)
        except Exception as error:  # of the compiler, or one that is raised again below
            failed.add(function)
            reason = str(error).strip().partition("\n")[0]
            log_once(f"LoMix: the backend 'lean' takes the place of 'compiled': {type(error).__name__}: {reason}")
            return function(*args)

    return call


def fuse(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """All maps ``(M, C, n)`` of the scales ``z (S, C, n)``, parameters as in :class:`Fusions`."""
    attention = torch.baddbmm(bias, weight, z).softmax(0)
    return (attention[:, :, None] * z[:, None]).sum(0)


def gradient_of_fuse(gradient: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """By each of the ``tensors``, the arguments of :func:`fuse`, where ``gradient`` is that by its maps."""
    _, pull = torch.func.vjp(fuse, *tensors)
    return pull(gradient)


class CompiledFusions(Fusions):
    """Fusion without a look at which scales a map has: in compiled loops all are cheap."""

    def mix(self, z):
        return compile_once(fuse)(z, self.weight, self.bias), None

    def pull(self, z, kept, gradient, of_z):
        of_scales, of_weight, of_bias = compile_once(gradient_of_fuse)(gradient, z, self.weight, self.bias)
        of_z += of_scales
        return [of_weight, of_bias[..., 0]]


class CompiledMaps(LeanMaps):
    """All maps of a part, as in the lean backend."""

    bank_of = BANKS | {Fusion: CompiledFusions}

    def __init__(self, mixers, terms, like: Tensor):
        super().__init__(mixers, terms, like)
        self.statistics_of_maps = compile_once(terms.statistics)
        self.gradient_of_maps = compile_once(terms.gradient)
