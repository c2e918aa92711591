"""The interface of a backend, which one is chosen, and how a large grid is computed slab by slab."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_lomix.loss.criterion import Criterion, Target
from nnunet_lomix.loss.grid import Slab
from nnunet_lomix.loss.maps import Map
from nnunet_lomix.loss.registry import Registry


class Case(NamedTuple):
    """What a backend computes: the maps of a loss, on a device.

    Attributes:
        maps: all maps of the loss.
        operators: by their names.
        criterion: what a map costs.
        num_classes: C.
        num_scales: S.
        device, dtype: of the computation.
    """

    maps: Sequence[Map]
    operators: Mapping[str, nn.Module]
    criterion: Criterion
    num_classes: int
    num_scales: int
    device: torch.device
    dtype: torch.dtype


class Backend(Protocol):
    """Computes the sums over pixels of all maps of a case, for which it is made: ``backend(case)``.

    Attributes:
        priority: of the backends that suit a case, the one with the highest is chosen.
    """

    priority: int

    def __init__(self, case: Case): ...

    @staticmethod
    def unsupported(case: Case) -> str | None:
        """Why it can't compute the case, as the end of a sentence; None if it can."""

    @staticmethod
    def suits(case: Case) -> bool:
        """Whether it is a good choice for the case if nobody has named a backend."""

    def pixels_at_once(self, batch: int, pixels: int, finest: int) -> int:
        """How many of the ``pixels`` of a grid in each of ``batch`` samples may be computed together.

        Args:
            finest: pixels of the finest output, of which the grid is a part.
        """

    def __call__(self, scales: Sequence[Tensor], target: Target) -> Tensor:
        """The sums of all maps, ``(M, B, 1 + 2 C)``, as from :meth:`Criterion.pixel_sums`; differentiable.

        Args:
            scales: the outputs at N pixels, each ``(B, C, N)``, finest first.
            target: the target at these pixels.
        """


BACKENDS: Registry[type[Backend]] = Registry("backend")


def choose(case: Case, named: str | None = None) -> tuple[str, Backend, dict[str, str]]:
    """The backend for a case: the named one, or else that of the highest priority among those that suit the case.

    Returns:
        Its name, the backend, and for each that would have come before it why it can't be used.

    Raises:
        ValueError: there is none of that name.
    """
    refusals: dict[str, str] = {}
    by_priority = sorted(BACKENDS, key=lambda name: -BACKENDS[name].priority)
    for name in by_priority if named is None else [named, *by_priority]:
        backend = BACKENDS[name]
        if name not in refusals and (name == named or backend.suits(case)):
            reason = backend.unsupported(case)
            if reason is None:
                return name, backend(case), refusals
            refusals[name] = reason
    raise RuntimeError(f"no backend supports this loss: {refusals}")


def add_up_slabs(backend: Backend, slabs: Sequence[Slab], targets: Sequence[Target]) -> Tensor:
    """The sums of all maps over all slabs of a grid, ``(M, B, 1 + 2 C)``.

    Of several slabs each is computed anew in the backward pass, so that one at a time is in memory.
    """

    def sums(slab: Slab, target: Target) -> Tensor:
        return backend(slab.scales(), target)

    if len(slabs) == 1:
        return sums(slabs[0], targets[0])
    parts = [
        checkpoint(sums, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(slabs, targets, strict=True)
    ]
    return torch.stack(parts).sum(0)


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast is off, on devices that have autocast at all."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
