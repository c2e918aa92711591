"""The interface of a backend, which one is chosen, and what the backends share."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_lomix.loss.criterion import Criterion, PixelSums, Target
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
        maps: all maps of the loss, also where a step evaluates a sample of them.
        criterion: what a map costs.
    """

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    maps: Sequence[BoundMap]
    criterion: Criterion


class Backend(Protocol):
    """Computes the sums over pixels of all maps; every loss has a backend object of its own.

    Attributes:
        priority: of the backends that suit a case, the one with the highest is chosen.
    """

    priority: int

    def unsupported(self, case: Case) -> str | None:
        """Why it can't compute the case, as the end of a sentence; None if it can."""

    def suits(self, case: Case) -> bool:
        """Whether it is a good choice for the case if nobody has named a backend."""

    def __call__(
        self, outputs: Sequence[Tensor], target: Target, maps: Sequence[BoundMap], criterion: Criterion
    ) -> PixelSums:
        """The sums of all maps, differentiable by the outputs and by the parameters of the operators.

        Args:
            outputs: of the decoder, ``(B, C, *spatial_j)``, finest first, in the dtype of the computation.
            target: the prepared target.
            maps: the M maps to compute.
            criterion: what a map costs.
        """


BACKENDS: Registry[type[Backend]] = Registry("backend")


def choose(case: Case, backends: Mapping[str, Backend]) -> tuple[str, list[str]]:
    """The name of the backend for a case, and why those that would be chosen before it can't be used."""
    refusals: list[str] = []
    for name, backend in sorted(backends.items(), key=lambda item: -item[1].priority):
        if backend.suits(case):
            reason = backend.unsupported(case)
            if reason is None:
                return name, refusals
            refusals.append(f"{name!r} can't be used: {reason}")
    raise RuntimeError(f"no backend supports this loss: {'; '.join(refusals)}")


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
