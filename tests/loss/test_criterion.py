"""The loss of every map is nnU-Net's own, in value and gradient; also on extreme patches."""

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch.nn import functional as F

from nnunet_lomix import LoMixLoss
from nnunet_lomix.loss.criterion import RegionCriterion, Target

from . import oracle

SIZES = {"2d": [(9, 6), (5, 3), (5, 2)], "3d": [(3, 6, 5), (3, 3, 3), (2, 2, 3)]}
KINDS = {
    "classes": {},
    "classes_ignore": {"ignore_label": 3},
    "regions": {"regions": True},
    "regions_ignore": {"regions": True, "ignore_label": 3},
}


def nnunet_loss(batch_dice, regions=False, ignore_label=None):
    """As in nnUNetTrainer._build_loss."""
    dice = {"batch_dice": batch_dice, "do_bg": regions, "smooth": 1e-5, "ddp": False}
    ignore = {"use_ignore_label": ignore_label is not None} if regions else {"ignore_label": ignore_label}
    loss = DC_and_BCE_loss if regions else DC_and_CE_loss
    return loss(soft_dice_kwargs=dice, **{"bce_kwargs" if regions else "ce_kwargs": {}}, **ignore,
                dice_class=MemoryEfficientSoftDiceLoss)  # fmt: skip


def logits_of(map_, outputs, loss):
    """A map (B, C, *spatial), by PyTorch's own layers."""
    operator = loss.operators[map_.operator]
    number = operator.subsets.index(map_.scales)
    size, spatial = outputs[0].shape[2:], outputs[0].ndim - 2
    mode = "bilinear" if spatial == 2 else "trilinear"
    scales = [F.interpolate(outputs[j], size, mode=mode) for j in map_.scales]
    convolve = F.conv2d if spatial == 2 else F.conv3d
    ones = (1,) * spatial
    if map_.operator == "concat":
        weight = torch.cat([operator.weight[number, :, 3 * j : 3 * j + 3] for j in map_.scales], 1)
        return convolve(torch.cat(scales, 1), weight[(..., *[None] * spatial)], operator.weight[number, :, -1])
    if map_.operator == "fusion":
        scores = [
            convolve(
                z, operator.weight[number, j, 3 * j : 3 * j + 3].reshape(1, -1, *ones), operator.weight[number, j, -1:]
            )
            for z, j in zip(scales, map_.scales, strict=True)
        ]
        return (torch.stack(scores).softmax(0) * torch.stack(scales)).sum(0)
    stack = torch.stack(scales)
    return stack.prod(0) if map_.operator == "multiply" else stack.sum(0)


def tensors(outputs, target, device):
    outputs = [torch.from_numpy(z).to(device, torch.float32).requires_grad_() for z in outputs]
    return outputs, torch.from_numpy(target).to(device)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dimensions", SIZES)
def test_each_map_has_the_loss_and_gradient_of_nnunet(dimensions, kind, batch_dice, device):
    arguments = KINDS[kind]
    arrays = oracle.example(SIZES[dimensions], regions="regions" in kind, ignore="ignore" in kind)
    outputs, target = tensors(*arrays, device)
    loss = LoMixLoss(3, 3, batch_dice=batch_dice, **arguments)
    generator = torch.Generator().manual_seed(1)
    for parameter in loss.operators.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    loss = loss.to(device)
    losses = loss.losses(outputs, target)
    theirs = nnunet_loss(batch_dice, **arguments)
    for ours, map_ in zip(losses, loss.maps, strict=True):
        expected = theirs(logits_of(map_, outputs, loss), target)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        variables = [outputs[j] for j in map_.scales] + list(loss.operators[map_.operator].parameters())
        for got, wanted in zip(
            torch.autograd.grad(ours, variables, retain_graph=True),
            torch.autograd.grad(expected, variables),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_the_two_terms(kind, device):
    outputs, target = tensors(*oracle.example(SIZES["2d"], regions="regions" in kind, ignore="ignore" in kind), device)
    both, ce, dice = (
        LoMixLoss(3, 3, weight_ce=a, weight_dice=b, **KINDS[kind]).to(device).losses(outputs, target)
        for a, b in [(0.3, 0.7), (1, 0), (0, 1)]
    )
    torch.testing.assert_close(both, 0.3 * ce + 0.7 * dice)
    assert (ce > 0).all() and (dice < 0).all() and (dice > -1).all()


EDGES = {
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


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize(("edge", "kind"), [(edge, kind) for edge in EDGES for kind in EDGES[edge]])
@pytest.mark.parametrize("stride", [1, 2])
def test_patches_at_the_edge(stride, edge, kind, batch_dice, batch, device):
    arguments = KINDS[kind]
    arrays = oracle.example(SIZES["2d"], batch=batch, regions="regions" in kind, ignore="ignore" in kind)
    outputs, target = tensors(*arrays, device)
    EDGES[edge][kind](target)
    loss = LoMixLoss(3, 3, batch_dice=batch_dice, stride=stride, **arguments).to(device)
    loss(outputs, target).backward()
    gradients = [t.grad for t in [*outputs, *loss.parameters()]]
    assert all(g.isfinite().all() for g in gradients)
    losses = loss.losses(outputs, target)
    theirs = nnunet_loss(batch_dice, **arguments)
    if stride == 1:
        expected = [theirs(logits_of(m, outputs, loss), target) for m in loss.maps]
        torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-4, atol=1e-5)
    if edge == "no valid pixel":
        assert all((z.grad == 0).all() for z in outputs)


def test_one_region_and_one_pixel(device):
    outputs, target = tensors(*oracle.example([(1, 1), (1, 1)], batch=1, classes=1, regions=True), device)
    loss = LoMixLoss(1, 2, regions=True).to(device)
    loss(outputs, target).backward()
    expected = nnunet_loss(False, regions=True)(outputs[0], target)
    torch.testing.assert_close(loss.losses(outputs, target)[0], expected)
    assert all(z.grad.isfinite().all() for z in outputs)


@pytest.mark.parametrize("kind", ["classes_ignore", "regions_ignore"])
def test_ignored_pixels_count_nowhere(kind, device):
    """Logits and labels of pixels that are ignored change neither losses nor gradients elsewhere."""
    outputs, target = oracle.example([(6, 6)] * 2, regions="regions" in kind, ignore=True)
    ignored = target[:, [-1]] == (1 if "regions" in kind else 3)
    loss = LoMixLoss(3, 2, **KINDS[kind]).to(device)
    mask = torch.from_numpy(ignored).to(device)
    results = []
    for noise in (0, 5):
        z, y = tensors([x + noise * ignored for x in outputs], target.copy(), device)
        if noise and "regions" in kind:
            y[:, :3] = torch.where(mask, 1 - y[:, :3], y[:, :3])
        losses = loss.losses(z, y)
        losses.sum().backward()
        assert all((x.grad * mask == 0).all() for x in z)
        results.append((losses.detach(), *(x.grad for x in z)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["classes", "regions"])
def test_sums_over_many_pixels_keep_their_precision(kind):
    """One structure fills a patch of 128^3: adding p up pixel by pixel in fp32 is wrong by half a percent."""
    z = torch.linspace(-1, 3, 2**21).view(1, 1, -1, 128)
    outputs, target = [torch.cat([-z, z], 1)] * 2, torch.ones_like(z)
    if kind == "regions":
        target = torch.cat([1 - target, target], 1)
    loss = LoMixLoss(2, 2, operators=(), weight_ce=0, backend="plain", **KINDS[kind])
    expected = loss.losses([x.double() for x in outputs], target)
    torch.testing.assert_close(loss.losses(outputs, target).double(), expected, rtol=1e-5, atol=0)


def test_the_cross_entropy_of_sure_regions_is_not_lost_in_their_logits():
    z = torch.linspace(9, 11, 1000)[None, None]
    got = RegionCriterion().pixel_sums(z, Target(None, torch.ones_like(z), None))[0, 0]
    torch.testing.assert_close(got.double(), F.softplus(-z.double()).sum(), rtol=3e-4, atol=0)
