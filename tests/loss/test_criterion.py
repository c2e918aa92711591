"""The loss of a map is nnU-Net's own, in value and gradient; also on extreme patches."""

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch.nn import functional as F

from nnunet_lomix import LoMixLoss
from nnunet_lomix.loss.criterion import Criterion, Target

from . import oracle

KINDS = {
    "classes": {},
    "classes_ignore": {"ignore_label": 3},
    "regions": {"regions": True},
    "regions_ignore": {"regions": True, "ignore_label": 3},
}
EDGES = {
    "any": dict.fromkeys(KINDS, lambda y: y),
    "no valid pixel": {"classes_ignore": lambda y: y.fill_(3), "regions_ignore": lambda y: y[:, -1].fill_(1)},
    "no valid pixel in one sample": {
        "classes_ignore": lambda y: y[0].fill_(3),
        "regions_ignore": lambda y: y[0, -1].fill_(1),
    },
    "no foreground": dict.fromkeys(["classes", "classes_ignore"], lambda y: y.masked_fill_(y < 3, 0))
    | dict.fromkeys(["regions", "regions_ignore"], lambda y: y[:, :3].fill_(0)),
    "one class everywhere": dict.fromkeys(["classes", "classes_ignore"], lambda y: y.masked_fill_(y < 3, 2))
    | dict.fromkeys(["regions", "regions_ignore"], lambda y: (y[:, :3].fill_(0), y[:, 1].fill_(1))),
}


def nnunet_loss(batch_dice, regions=False, ignore_label=None, **weights):
    """As in nnUNetTrainer._build_loss."""
    dice = {"batch_dice": batch_dice, "do_bg": regions, "smooth": 1e-5, "ddp": False}
    ignore = {"use_ignore_label": ignore_label is not None} if regions else {"ignore_label": ignore_label}
    loss = DC_and_BCE_loss if regions else DC_and_CE_loss
    return loss(soft_dice_kwargs=dice, **{"bce_kwargs" if regions else "ce_kwargs": {}}, **ignore, **weights,
                dice_class=MemoryEfficientSoftDiceLoss)  # fmt: skip


def tensors(outputs, target, device):
    outputs = [torch.from_numpy(z).to(device, torch.float32).requires_grad_() for z in outputs]
    return outputs, torch.from_numpy(target).to(device)


def assert_equals_nnunets(z, target, device, batch_dice=False, **arguments):
    results = []
    for loss in (Criterion(batch_dice=batch_dice, **arguments), nnunet_loss(batch_dice, **arguments)):
        value = loss(z, target)
        results.append([value, *torch.autograd.grad(value, z)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize(("edge", "kind"), [(edge, kind) for edge in EDGES for kind in EDGES[edge]])
def test_value_and_gradient_are_nnunets(edge, kind, batch_dice, batch, device):
    sizes = [(9, 6), (5, 3), (5, 2)] if batch_dice else [(3, 6, 5), (3, 3, 3), (2, 2, 3)]
    arrays = oracle.example(sizes, batch=batch, regions="regions" in kind, ignore="ignore" in kind)
    outputs, target = tensors(*arrays, device)
    EDGES[edge][kind](target)
    for weights in ({}, {"weight_ce": 0.3, "weight_dice": 0.7}):
        assert_equals_nnunets(outputs[0], target, device, batch_dice, **KINDS[kind], **weights)
    loss = LoMixLoss(3, 3, batch_dice=batch_dice, stride=2, **KINDS[kind]).to(device)
    loss(outputs, target).backward()
    assert all(t.grad.isfinite().all() for t in [*outputs, *loss.parameters()])
    if edge == "no valid pixel":
        assert all((z.grad == 0).all() for z in outputs)


def test_one_region_and_one_pixel(device):
    (z,), target = tensors(*oracle.example([(1, 1)], batch=1, classes=1, regions=True), device)
    assert_equals_nnunets(z, target, device, regions=True)


@pytest.mark.parametrize("kind", ["classes", "regions"])
def test_sums_over_many_pixels_keep_their_precision(kind):
    """One structure fills a patch of 128^3: adding p up pixel by pixel in fp32 is wrong by half a percent."""
    z = torch.linspace(-1, 3, 2**21).view(1, 1, -1, 128)
    z, target = torch.cat([-z, z], 1), torch.ones_like(z)
    if kind == "regions":
        target = torch.cat([1 - target, target], 1)
    criterion = Criterion(weight_ce=0, **KINDS[kind])
    torch.testing.assert_close(criterion(z, target).double(), criterion(z.double(), target), rtol=1e-5, atol=0)


def test_the_cross_entropy_of_sure_regions_is_not_lost_in_their_logits():
    z = torch.linspace(9, 11, 1000)[None, None]
    got = Criterion(regions=True).pixel_sums(z, Target(None, torch.ones_like(z), None))[0, 0]
    torch.testing.assert_close(got.double(), F.softplus(-z.double()).sum(), rtol=3e-4, atol=0)
