"""What goes wrong in a naive port, and that it doesn't here.

The scheduler and weight decay, the fourth trap, are tested with the trainer.
"""

import weakref

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_lomix import LoMixLoss
from nnunet_lomix.loss.backends import plain
from nnunet_lomix.loss.rules import RULES

TARGET = torch.zeros(1, 1, 16, 16).long()
TARGET[..., 4:12, 4:12] = 1


def free_logits(coarse, z_0=0.0):
    """Three outputs of two classes: z_0 noise plus a multiple of the truth, the coarser that of the truth."""
    truth = F.one_hot(TARGET[:, 0], 2).movedim(-1, 1).float() * 2 - 1
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    outputs = [0.1 * noise + z_0 * truth] + [coarse * F.avg_pool2d(truth, 2**j) for j in (1, 2)]
    return [z.requires_grad_() for z in outputs]


# 1. Starvation


@pytest.mark.parametrize("operators", [("add", "concat", "fusion"), ("add", "multiply", "concat", "fusion")])
@pytest.mark.parametrize("coarse", [1, 3, 8])
def test_z_0_gets_its_share_of_the_gradient_beside_good_coarse_outputs(coarse, operators):
    outputs = free_logits(coarse)
    (alone,) = torch.autograd.grad(LoMixLoss(2, 3).losses(outputs, TARGET)[0], outputs[:1])

    def progress(share):
        """How far the gradient goes in the direction of supervising z_0 alone."""
        (gradient,) = torch.autograd.grad(LoMixLoss(2, 3, operators, share=share)(outputs, TARGET), outputs[:1])
        return ((gradient * alone).sum() / alone.square().sum()).item()

    assert progress(0.5) >= 0.5
    if "multiply" not in operators:  # it multiplies the gradient by the coarse logits
        assert progress(0.0) < 0.35


def test_z_0_is_trained_when_the_weights_would_leave_it():
    def train(share):
        loss, outputs = LoMixLoss(2, 3, share=share, backend="plain"), free_logits(coarse=6)
        network = torch.optim.SGD(outputs, lr=15)
        weights = torch.optim.Adam(loss.rule.parameters(), lr=3e-2)
        for _ in range(60):
            network.zero_grad()
            weights.zero_grad()
            loss(outputs, TARGET).backward()
            network.step()
            weights.step()
        return loss.weights()[0].item(), loss.losses(outputs, TARGET)[0].item()

    _, loss_of_z_0 = train(share=0.5)
    starved_weight, loss_of_starved = train(share=0.0)
    assert starved_weight < 1 / 19  # falls below its equal share
    assert loss_of_z_0 < loss_of_starved - 0.5


def nnunets_deep_supervision(num_scales):
    """nnU-Net's own loss: each output against a target of its resolution, with 1/2^j, the coarsest with nothing."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    criterion = DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)
    weights = [2.0**-j for j in range(num_scales - 1)] + [0.0]
    return DeepSupervisionWrapper(criterion, [w / sum(weights) for w in weights])


def test_fixed_equal_weights_starve_or_flood_the_finest_head_where_the_coarse_outputs_are_good():
    """Sums of a bad ``z_0`` with good outputs are good, and ask little of it; products multiply its gradient."""
    generator = torch.Generator().manual_seed(0)
    target = F.interpolate((torch.rand(1, 1, 4, 4, generator=generator) * 9).floor(), scale_factor=8)
    truth = F.one_hot(target[:, 0].long(), 9).movedim(-1, 1).float() * 2 - 1
    features = torch.cat([truth[:, :4], torch.zeros_like(truth[:, 4:])], 1) + torch.randn(
        truth.shape, generator=generator
    )
    weight = 0.1 * torch.randn(9, 9, 1, 1, generator=generator)

    def gradient(loss):
        head = weight.clone().requires_grad_()
        outputs = [F.conv2d(features, head), *(3 * F.avg_pool2d(truth, 2**j) for j in range(1, 5))]
        loss(outputs, [target[..., :: 2**j, :: 2**j] for j in range(5)]).backward()
        return head.grad.norm().item()

    nnunet = gradient(nnunets_deep_supervision(5))
    assert 0.5 < gradient(LoMixLoss(9, 5, anchor=nnunets_deep_supervision(5))) / nnunet < 2
    assert gradient(LoMixLoss(9, 5, ("add", "concat", "fusion"), rule="equal", share=0.0)) / nnunet < 0.5
    assert gradient(LoMixLoss(9, 5, rule="equal", share=0.0)) / nnunet > 2


# 2. Explosion and fading


def nnunets_optimiser(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)


@pytest.mark.parametrize("rule", RULES)
def test_weights_stay_bounded_where_the_naive_ones_explode(rule):
    loss = LoMixLoss(2, 3, rule=rule, share=0.0 if rule == "softplus" else 0.5, backend="plain")
    outputs, seen, objective = free_logits(coarse=9, z_0=9), [], loss.rule.objective
    loss.rule.objective = lambda losses: seen.append(losses) or objective(losses)
    optimiser = nnunets_optimiser(loss.rule.parameters()) if list(loss.rule.parameters()) else None
    sums = [loss.weights().sum().item()]
    for _ in range(50):
        total = loss(outputs, TARGET)
        total.backward()
        if optimiser:
            optimiser.step()
            optimiser.zero_grad()
        sums.append(loss.weights().sum().item())
        assert total.isfinite()
    assert (torch.stack(seen) >= 0).all()
    if rule == "softplus":  # the paper's rule only falls
        assert all(after <= before + 1e-5 for before, after in zip(sums, sums[1:], strict=False))
    else:
        assert sums == pytest.approx([1] * len(sums))


# 3. Half precision: test_lomix.py


# 5. Memory


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made in this context held at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return result

    def freed(self, size):
        self.now -= size


def assert_takes_as_little_as_nnunets(lomix, sizes, classes, at_most):
    """``at_most`` times the bytes of nnU-Net's own loss, beyond the arguments, forward and backward."""
    peaks = []
    for loss in (nnunets_deep_supervision(len(sizes)), lomix):
        outputs = [torch.zeros(2, classes, *size, requires_grad=True) for size in sizes]
        targets = [torch.zeros(2, 1, *size) for size in sizes]
        with torch.no_grad():
            loss(outputs, targets)  # what is kept
        memory = PeakMemory()
        memory.known.update(tensor.untyped_storage() for tensor in (*outputs, *targets))  # they are there
        with memory:
            loss(outputs, targets).backward()
        peaks.append(memory.peak)
    assert peaks[0] > 2**22 and peaks[1] <= at_most * peaks[0], (peaks, peaks[1] / peaks[0])


@pytest.mark.parametrize(("stride", "at_most"), [(2, 1), (1, 2)])
def test_memory_of_large_maps_is_of_the_order_of_nnunets_own_loss(stride, at_most, monkeypatch):
    """At most that of nnU-Net's deep supervision by the default, twice that on every pixel; 4 mixed scales."""
    monkeypatch.setattr(plain, "MOST_VALUES", 0)  # none is small
    monkeypatch.setattr(plain, "VALUES_OF_CPU", 2**13)  # slabs about as small beside the image as in 3D training
    sizes = [(32 // 2**j, 64 // 2**j, 64 // 2**j) for j in range(5)]
    loss = LoMixLoss(4, 5, share=0, stride=stride, backend="plain")
    assert_takes_as_little_as_nnunets(loss, sizes, 4, at_most)


def test_a_trained_network_is_not_drowned_by_products_of_its_logits():
    """From a trained network, equal weights gave first steps almost orthogonal to those of z_0."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(32.0) - 15.5
    target = ((y**2 + y[:, None] ** 2) < 100).long().expand(2, 1, 32, 32)
    signal = torch.where(target == torch.arange(2).view(1, 2, 1, 1), 4.0, -4.0)
    features = (signal + 4 * torch.randn(signal.shape, generator=generator)).requires_grad_()
    outputs = [features, *(2 * F.avg_pool2d(features, 2**j) for j in (1, 2, 3))]

    def towards_z_0(loss):
        (alone,) = torch.autograd.grad(loss.losses(outputs, target)[0], features, retain_graph=True)
        (gradient,) = torch.autograd.grad(loss(outputs, target), features, retain_graph=True)
        return F.cosine_similarity(gradient.flatten(), alone.flatten(), 0).item()

    equal = LoMixLoss(2, 4)
    equal.rule.steps.fill_(1)
    assert towards_z_0(equal) < 0.1
    assert towards_z_0(LoMixLoss(2, 4)) > 0.9
