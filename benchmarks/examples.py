"""The losses that are measured, and random outputs and targets for them."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from cases import NNUNET, STRIDE, Case
from measuring import now
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.loss import BACKENDS, LoMixLoss, backends


def names_of_losses(backends: Iterable[str]) -> list[str]:
    """nnU-Net's own loss, and LoMix by each backend: on the default trainer's grid, and on every pixel."""
    return [NNUNET, *(name for backend in backends for name in (backend, f"{backend}, stride 1"))]


def backend_and_stride(name: str) -> tuple[str, int]:
    """The two that a name of :func:`names_of_losses` stands for."""
    backend, _, stride = name.partition(", stride ")
    return backend, int(stride or STRIDE)


def losses_for(case: Case, device: str, wanted: Sequence[str] = ()) -> list[str]:
    """What is measured for a case: the wanted losses, or else nnU-Net's own and those of all backends that serve.

    Raises:
        LoMixError: a wanted backend can't compute the case, so that another one would take its place.
    """
    reasons = {name: backend.unsupported(engine_case(make_lomix(case), device)) for name, backend in BACKENDS.items()}
    for name in wanted:
        backend, _ = backend_and_stride(name)
        if reasons.get(backend):
            raise LoMixError(f"The backend {backend!r} can't compute {case}: {reasons[backend]}.")
    return list(wanted) or names_of_losses(name for name, reason in reasons.items() if reason is None)


def default_backend(case: Case, device: str) -> str:
    """The backend that LoMix takes by itself."""
    name, _, _ = backends.choose(engine_case(make_lomix(case), device))
    return name


def engine_case(lomix: LoMixLoss, device: str) -> backends.Case:
    """A loss as the backends know it."""
    parts = lomix.maps, dict(lomix.operators.items()), lomix.criterion
    return backends.Case(*parts, lomix.num_classes, lomix.num_scales, torch.device(device), torch.float32)


def make_loss(name: str, case: Case, device: str) -> nn.Module:
    """nnU-Net's deep supervision, as its trainer builds it, or LoMix."""
    if name != NNUNET:
        return make_lomix(case, *backend_and_stride(name)).to(device)
    dice = {"batch_dice": False, "do_bg": case.regions, "smooth": 1e-5, "ddp": False}
    kind, entropy = (DC_and_BCE_loss, "bce_kwargs") if case.regions else (DC_and_CE_loss, "ce_kwargs")
    loss = kind(soft_dice_kwargs=dice, dice_class=MemoryEfficientSoftDiceLoss, **{entropy: {}})
    weights = np.array([1 / 2**i for i in range(case.scales)])
    weights[-1] = 0
    return DeepSupervisionWrapper(loss, weights / weights.sum())


def make_lomix(case: Case, backend: str | None = None, stride: int = STRIDE) -> LoMixLoss:
    """The maps alone: the default trainer's anchor is nnU-Net's own loss, which is measured by itself."""
    kind = {"mixed_scales": case.mixed_scales, "regions": case.regions}
    return LoMixLoss(case.classes, case.scales, **kind, share=0, stride=stride, backend=backend)


def count_maps(name: str, case: Case) -> int:
    """How many maps a loss supervises; nnU-Net leaves out the coarsest output."""
    return case.scales - 1 if name == NNUNET else len(make_lomix(case).maps)


def sizes_of(case: Case) -> list[list[int]]:
    """Voxels of each output along each axis, the finest first."""
    return [[max(1, length // 2**j) for length in case.size] for j in range(case.scales)]


def make_outputs(case: Case, device: str) -> list[Tensor]:
    """Outputs of a network, the finest first; always the same random ones."""
    torch.manual_seed(0)
    return [torch.randn(case.batch, case.classes, *size, device=device, requires_grad=True) for size in sizes_of(case)]


def make_targets(case: Case, device: str) -> list[Tensor]:
    """The target at the size of each output, as nnU-Net's data loader gives it; always the same random one."""
    torch.manual_seed(0)
    values, channels = (2, case.classes) if case.regions else (case.classes, 1)
    target = torch.randint(values, (case.batch, channels, *case.size), device=device).float()
    return [F.interpolate(target, size) for size in sizes_of(case)]


def time_passes(loss: nn.Module, outputs: list[Tensor], targets: list[Tensor], device: str) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass."""
    for tensor in [*outputs, *loss.parameters()]:
        tensor.grad = None
    start = now(device)
    value = loss(outputs, targets)
    middle = now(device)
    value.backward()
    return middle - start, now(device) - middle
