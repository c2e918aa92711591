"""The look-ahead: scalar products of gradients, by a central difference instead of a backward pass for each map."""

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_lomix.loss import LoMixLoss


class Network(nn.Module):
    """A shared convolution, and a head for each of three scales; the last may be noise."""

    def __init__(self, noise: bool = False):
        super().__init__()
        self.body = nn.Conv2d(1, 6, 3, padding=1)
        self.heads = nn.ModuleList(nn.Conv2d(6, 3, 1) for _ in range(3))
        self.noise = noise

    def forward(self, x: Tensor) -> list[Tensor]:
        features = F.softplus(self.body(x))
        outputs = [head(F.avg_pool2d(features, 2**j)) for j, head in enumerate(self.heads)]
        if self.noise:
            z = outputs[-1]
            outputs[-1] = 2 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z) + 0 * z
        return outputs


def example(seed: int = 0, batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(3, (batch, 1, 8, 8), generator=generator)
    return target.double() + 0.3 * torch.randn(batch, 1, 8, 8, generator=generator).double(), target


def exact(network: nn.Module, loss: LoMixLoss, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """One backward pass for each map."""

    def gradient(data: Tensor, target: Tensor, i: int) -> Tensor:
        parameters = [*network.parameters()]
        value = loss.losses(network(data), target)[i]
        parts = torch.autograd.grad(value, parameters, allow_unused=True)
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(parameters, parts, strict=True)
            ]
        )

    along = gradient(*first, 0)
    return torch.stack([gradient(*second, i) @ along / along.norm() for i in range(len(loss.maps))])


@pytest.mark.parametrize("held_out", [False, True])
def test_equals_one_backward_pass_for_each_map(extensions: ModuleType, held_out: bool) -> None:
    torch.manual_seed(0)
    network, loss, (data, target) = Network().double(), LoMixLoss(3, 3).double(), example()
    before = [p.clone() for p in network.parameters()]
    measured = extensions.measure_alignment(network, loss, data, target, held_out, step=1e-5)
    halves = ((data[::2], target[::2]), (data[1::2], target[1::2])) if held_out else ((data, target),) * 2
    torch.testing.assert_close(measured, exact(network, loss, *halves), rtol=1e-6, atol=1e-8)
    assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))
    assert all(p.grad is None for p in [*network.parameters(), *loss.parameters()])
    assert loss.rule.steps == 0


def test_the_default_step_is_good_enough_in_single_precision(extensions: ModuleType) -> None:
    torch.manual_seed(0)
    network, loss, (data, target) = Network(), LoMixLoss(3, 3), example()
    data = data.float()
    expected = exact(network, loss, (data, target), (data, target))
    torch.testing.assert_close(
        extensions.measure_alignment(network, loss, data, target), expected, rtol=0.02, atol=0.02 * expected[0].item()
    )


def test_a_batch_of_one_sample_is_its_own_held_out_half(extensions: ModuleType) -> None:
    network, loss, (data, target) = Network(), LoMixLoss(3, 3), example(batch=1)
    both = [extensions.measure_alignment(network, loss, data.float(), target, held_out) for held_out in (True, False)]
    torch.testing.assert_close(*both)


def test_an_output_of_noise_helps_nobody(extensions: ModuleType) -> None:
    torch.manual_seed(0)
    network, loss, (data, target) = Network(noise=True), LoMixLoss(3, 3, operators=("add",)), example()
    alignment = extensions.measure_alignment(network, loss, data.float(), target)
    by_name = dict(zip((m.name for m in loss.maps), (alignment / alignment[0]).tolist(), strict=True))
    assert by_name["z_2"] == pytest.approx(0, abs=1e-3)
    assert 0.1 < by_name["add_0_1"] < 1


def test_no_gradient_no_direction(extensions: ModuleType) -> None:
    network, loss, (data, target) = Network(), LoMixLoss(3, 3), example()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(float("nan"))
    calls, losses = [], loss.losses
    loss.losses = lambda *args: calls.append(args) or losses(*args)
    assert (extensions.measure_alignment(network, loss, data.float(), target) == 0).all()
    assert len(calls) == 3  # under DDP the ranks that have a direction wait for the sums of this one


def test_the_network_keeps_its_parameters_also_of_a_module_that_it_has_twice(extensions: ModuleType) -> None:
    """nnU-Net's decoder has the encoder in it; torch.func.functional_call leaves other tensors in such a module."""
    network, (data, target) = Network(), example()
    network.decoder = nn.ModuleDict({"encoder": network.body})
    before = {name: id(p) for name, p in network.named_parameters(remove_duplicate=False)}
    extensions.measure_alignment(network, LoMixLoss(3, 3), data.float(), target)
    assert {name: id(p) for name, p in network.named_parameters(remove_duplicate=False)} == before


def test_running_statistics_stay_as_they_were(extensions: ModuleType) -> None:
    torch.manual_seed(0)
    network = Network().double()
    network.body = nn.Sequential(network.body, nn.BatchNorm2d(6)).double()
    before = {name: b.clone() for name, b in network.named_buffers()}
    assert before
    extensions.measure_alignment(network, LoMixLoss(3, 3).double(), *example())
    assert all((b == before[name]).all() for name, b in network.named_buffers())
