"""The losses that are measured, and random outputs and targets for them."""

from collections.abc import Sequence

import numpy as np
import torch
from cases import MOST_VALUES_OF_PLAIN, NNUNET, Case
from measuring import now
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.loss import BACKENDS, LoMixLoss, backends


def backends_for(case: Case, device: str, wanted: Sequence[str] = ()) -> list[str]:
    """What is measured for a case: the wanted backends, or else nnU-Net's own loss and all that serve.

    Raises:
        LoMixError: a wanted backend can't compute the case, so that another one would take its place.
    """
    reasons = {name: make().unsupported(engine_case(case, device)) for name, make in BACKENDS.items()}
    for name in wanted:
        if reasons.get(name):
            raise LoMixError(f"The backend {name!r} can't compute {case}: {reasons[name]}.")
    if wanted:
        return list(wanted)
    if case.values(count_maps("plain", case)) > MOST_VALUES_OF_PLAIN:
        reasons["plain"] = "it would need too much memory"
    return [NNUNET, *(name for name, reason in reasons.items() if reason is None)]


def default_backend(case: Case, device: str, evaluated: int | None = None) -> str:
    """The backend that LoMix takes by itself if so many maps are evaluated, default all."""
    name, _, _ = backends.choose(engine_case(case, device, evaluated))
    return name


def engine_case(case: Case, device: str, evaluated: int | None = None) -> backends.Case:
    """A case as the backends know it."""
    loss = make_lomix(None, case, "cpu")
    maps = [backends.base.BoundMap(loss.operators[m.name], m.scales) for m in loss.maps]
    shape = torch.Size([case.batch, case.classes, *case.size])
    return backends.Case(torch.device(device), torch.float32, shape, maps, evaluated or len(maps), loss.criterion)


def make_loss(backend: str, case: Case, device: str) -> nn.Module:
    """nnU-Net's deep supervision, as its trainer builds it, or LoMix by a backend."""
    if backend != NNUNET:
        return make_lomix(backend, case, device)
    dice = {"batch_dice": False, "do_bg": case.regions, "smooth": 1e-5, "ddp": False}
    kind, entropy = (DC_and_BCE_loss, "bce_kwargs") if case.regions else (DC_and_CE_loss, "ce_kwargs")
    loss = kind(soft_dice_kwargs=dice, dice_class=MemoryEfficientSoftDiceLoss, **{entropy: {}})
    weights = np.array([1 / 2**i for i in range(case.scales)])
    weights[-1] = 0
    return DeepSupervisionWrapper(loss, weights / weights.sum())


def make_lomix(backend: str | None, case: Case, device: str) -> LoMixLoss:
    """LoMix by a backend, or by the one that it takes by itself."""
    loss = LoMixLoss(case.classes, case.scales, mixed_scales=case.mixed_scales, regions=case.regions, backend=backend)
    return loss.to(device)


def count_maps(backend: str, case: Case) -> int:
    """How many maps a loss supervises; nnU-Net leaves out the coarsest output."""
    if backend == NNUNET:
        return case.scales - 1
    return len(make_lomix(None, case, "cpu").maps)


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
