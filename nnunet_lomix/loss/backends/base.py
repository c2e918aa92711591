"""The interface of a backend, which one is chosen, and what the backends share."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_lomix.loss.criterion import Criterion, PixelSums, Target, TargetSums
from nnunet_lomix.loss.registry import Registry


class BoundMap(NamedTuple):
    """A map as a backend needs it.

    Attributes:
        operator: called with the list of its scales, each ``(B, C, N)``.
        scales: their indices.
    """

    operator: nn.Module
    scales: tuple[int, ...]


class Case(NamedTuple):
    """What tells a backend whether it serves.

    Attributes:
        device, dtype, shape: of ``z_0``, ``(B, C, *spatial)``, in the dtype of the computation.
        maps: all maps of the loss.
        evaluated: how many maps a step computes.
        criterion: what a map costs.
    """

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    maps: Sequence[BoundMap]
    evaluated: int
    criterion: Criterion


class Backend(Protocol):
    """Computes the sums over pixels of all maps; a loss makes one for each kind of case.

    Attributes:
        priority: of the backends that suit a case, the one with the highest is chosen.
    """

    priority: int

    def unsupported(self, case: Case) -> str | None:
        """Why it can't compute the case, as the end of a sentence; None if it can."""

    def suits(self, case: Case) -> bool:
        """Whether it is a good choice for the case if nobody has named a backend."""

    def __call__(
        self,
        outputs: Sequence[Tensor],
        target: Target,
        maps: Sequence[BoundMap],
        criterion: Criterion,
        chosen: Tensor | None = None,
    ) -> tuple[PixelSums, TargetSums]:
        """The sums of the maps, differentiable by the outputs and by the parameters of the operators, and the target's.

        Args:
            outputs: of the decoder, ``(B, C, *spatial_j)``, finest first, in the dtype of the computation.
            target: the prepared target.
            maps: all maps of the loss.
            criterion: what a map costs.
            chosen: numbers of the M maps to compute, int64 on the device of the outputs, also the same one twice; None
                for all.
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
        backend = BACKENDS[name]()
        if name not in refusals and (name == named or backend.suits(case)):
            reason = backend.unsupported(case)
            if reason is None:
                return name, backend, refusals
            refusals[name] = reason
    raise RuntimeError(f"no backend supports this loss: {refusals}")


def of_chosen(
    compute: Callable[[Sequence[BoundMap]], PixelSums], maps: Sequence[BoundMap], chosen: Tensor | None
) -> PixelSums:
    """The sums of the chosen maps by a function that takes a list of maps, each of them once.

    The host has to know the list, so a GPU that has chosen is waited for.
    """
    if chosen is None:
        return compute(maps)
    numbers, places = chosen.unique(return_inverse=True)
    return compute([maps[i] for i in numbers.tolist()]).select_maps(places)


def resample(logits: Tensor, size: torch.Size) -> Tensor:
    """ẑ: logits ``(B, C, *spatial)`` at ``size``, bilinear or trilinear, pixels flattened: ``(B, C, N)``."""
    if logits.shape[2:] != size:
        mode = "bilinear" if logits.ndim == 4 else "trilinear"
        logits = F.interpolate(logits, size, mode=mode, align_corners=False)
    return logits.flatten(2)


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast is off, on devices that have autocast at all."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
