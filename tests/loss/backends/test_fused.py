"""The Triton kernels equal the plain backend: on CUDA, or where there is none by Triton's interpreter."""

import logging
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from nnunet_lomix import LoMixLoss
from nnunet_lomix.loss import DEFAULT_OPERATORS
from nnunet_lomix.loss.backends import fused, lean

from .. import oracle
from ..test_lomix import build, cases, tensors

pytest.importorskip("triton")
from nnunet_lomix.loss.backends import kernels  # noqa: E402  imports Triton


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, the last one not full."""
    monkeypatch.setattr(fused, "VALUES_OF_BLOCK", 2**6)
    monkeypatch.setattr(fused, "self_check", cache(fused.self_check.__wrapped__))
    yield


def warnings(caplog):
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def results(backend, device, sizes, classes, **kwargs):
    """Losses and all gradients."""
    regions, ignore = kwargs.get("regions", False), kwargs.get("ignore_label") is not None
    outputs, target = oracle.example(sizes, classes=classes, regions=regions, ignore=ignore)
    torch.manual_seed(0)
    loss = LoMixLoss(classes, len(sizes), backend=backend, **kwargs)
    for p in loss.operators.parameters():
        torch.nn.init.normal_(p)
    loss = loss.to(device)
    z = [torch.from_numpy(o).to(device, torch.float32).requires_grad_() for o in outputs]
    losses = loss.losses(z, torch.from_numpy(target).to(device))
    factors = torch.linspace(0.5, 2, len(losses), device=device)
    return [losses, *torch.autograd.grad((factors * losses).sum(), [*z, *loss.operators.parameters()])]


@pytest.mark.parametrize(
    "sizes, classes, kwargs",
    [
        ([(5, 7), (3, 4), (2, 2)], 3, {"operators": ("add", "multiply", "concat")}),
        ([(5, 7), (3, 4)], 3, {"ignore_label": 3, "batch_dice": True}),
        ([(3, 4, 2), (3, 2, 2), (1, 2, 1)], 2, {"regions": True, "operators": ("fusion",)}),
        ([(5, 7), (3, 4)], 1, {"regions": True, "ignore_label": 1}),
        ([(4, 3), (2, 3), (2, 1)], 17, {"operators": ("multiply", "fusion")}),
        ([(6, 1), (3, 1)], 4, {"operators": ()}),
    ],
)
def test_equals_the_plain_backend(sizes, classes, kwargs, device, caplog):
    got = results("fused", device, sizes, classes, **kwargs)
    assert not warnings(caplog)  # no fall-back
    for a, b in zip(got, results("plain", device, sizes, classes, **kwargs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(DEFAULT_OPERATORS).filter(lambda case: case[0]["num_scales"] <= 3))  # the interpreter is slow
def test_equals_the_plain_backend_in_any_case(device, case, monkeypatch):
    monkeypatch.setattr(fused, "self_check", lambda *args: None)
    gradients = []
    for backend, dtype in (("fused", torch.float32), ("plain", torch.float64)):
        loss, *arrays = build(case, backend, device)
        loss = loss.to(dtype)
        outputs, target = tensors(*arrays, device, dtype)
        losses = loss.losses(outputs, target)
        factors = torch.linspace(0.5, 2, len(losses), dtype=dtype, device=device)
        grads = torch.autograd.grad((factors * losses).sum(), [*outputs, *loss.operators.parameters()])
        gradients.append([losses.double(), *(g.double() for g in grads)])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize("of_part, of_piece", [(40, 2**26), (2**19, 40)])
def test_several_parts_and_pieces(of_part, of_piece, device, monkeypatch):
    monkeypatch.setattr(lean, "VALUES", {device.type: of_part})
    monkeypatch.setattr(fused, "VALUES_OF_PIECE", of_piece)
    sizes = [(5, 6), (3, 3)]
    for a, b in zip(results("fused", device, sizes, 2), results("plain", device, sizes, 2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_training_goes_as_by_the_plain_backend(device, monkeypatch):
    monkeypatch.setattr(fused, "VALUES_OF_BLOCK", 2**12)
    torch.manual_seed(0)
    images = torch.randn(2, 1, 8, 8, device=device)
    target = (images > 0).long()
    curves = []
    for backend in ("fused", "plain"):
        torch.manual_seed(0)
        fine, coarse = (torch.nn.Conv2d(1, 2, 3, padding=1, stride=stride, device=device) for stride in (1, 2))
        loss = LoMixLoss(2, 2, backend=backend).to(device)
        parameters = [*fine.parameters(), *coarse.parameters(), *loss.parameters()]
        optimizer = torch.optim.SGD(parameters, 0.3, momentum=0.9)
        curve = []
        for _ in range(15):
            optimizer.zero_grad()
            value = loss([fine(images), coarse(images)], target)
            value.backward()
            optimizer.step()
            curve.append(value.detach())
        curves.append(torch.stack(curve))
    assert curves[1][-1] < curves[1][0] - 0.3
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-3)


class Fenced:
    """A kernel whose tensors lie in the middle of larger ones, of numbers that would be seen."""

    def __init__(self, kernel, number):
        self.kernel = kernel
        self.number = number
        self.blocks = []

    def __getitem__(self, grid):
        self.blocks.append(grid[0])

        def launch(*args, **kwargs):
            tensors = {i: arg for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)}
            fenced = {i: fence(tensor, self.number) for i, tensor in tensors.items()}
            self.kernel[grid](*(fenced[i][0] if i in fenced else arg for i, arg in enumerate(args)), **kwargs)
            for i, (inner, outer) in fenced.items():
                tensors[i].copy_(inner)
                inner.fill_(outer[0])
                torch.testing.assert_close(outer, outer[:1].expand_as(outer), rtol=0, atol=0, equal_nan=True)

        return launch


def fence(tensor, number):
    """A copy of the tensor, and the larger one that it lies in."""
    number = number if tensor.is_floating_point() else 10**6
    outer = torch.full((3 * max(tensor.numel(), 500),), number, dtype=tensor.dtype, device=tensor.device)
    inner = outer[len(outer) // 3 :][: tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor), outer


# NaN isn't lost in what it is multiplied by, a number isn't lost in what is added to it
@pytest.mark.parametrize("number", [torch.nan, 1000])
@pytest.mark.parametrize("regions", [False, True])
def test_kernels_write_to_their_own_memory_only_and_use_no_other(regions, number, device, monkeypatch, caplog):
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(kernels, name, Fenced(getattr(kernels, name), number))
    arguments = {"classes": 3, "regions": regions, "ignore_label": 3}
    sizes = [(5, 7), (5, 4), (3, 2)]  # more pixels than two blocks
    got = results("fused", device, sizes, **arguments)
    assert not warnings(caplog)  # no fall-back
    assert max(kernels.backward_kernel.blocks) == 3
    for a, b in zip(got, results("plain", device, sizes, **arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_large_products_keep_their_precision(device):
    torch.manual_seed(0)
    labels = torch.randint(3, (1, 1, 8, 8), device=device)
    sign = 2 * torch.nn.functional.one_hot(labels[:, 0], 3).permute(0, 3, 1, 2) - 1
    z = [20 * sign * (1 + torch.rand(1, 3, 8, 8, device=device)) for _ in range(3)]  # right everywhere, and sure of it
    loss = LoMixLoss(3, 3, ("multiply",), backend="fused").to(device)
    assert (loss.observed(loss.losses(z, labels)) >= 0).all()


def test_sure_regions_keep_their_precision(device):
    z = [10 + torch.rand(1, 2, n, n, device=device) for n in (8, 4)]
    losses = []
    for backend, dtype in (("fused", torch.float32), ("plain", torch.float64)):
        loss = LoMixLoss(2, 2, (), regions=True, weight_dice=0, backend=backend).to(device, dtype)
        losses.append(loss.losses([x.to(dtype) for x in z], torch.ones(1, 2, 8, 8, device=device)).double())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


# the interpreter takes what the compiler refuses; an A100 and an H100 are compiled for without one
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", [(5, 14, False, False), (3, 1, True, True), (7, 70, False, True)])
def test_kernels_compile_for_gpus(capability, case):
    code = f"""
from kernels import compile_for
from nnunet_lomix.loss.backends import kernels
for kernel in (kernels.forward_kernel, kernels.backward_kernel):
    code = compile_for({capability}, kernel, *{case}).asm
    assert code["cubin"] and "acq_rel" not in code["ptx"]  # each such addition would empty the cache
"""
    benchmarks = Path(__file__).parents[3] / "benchmarks"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=benchmarks)


def test_another_sample_of_mutants_is_not_another_check(device):
    loss = LoMixLoss(2, 3, ("add", "multiply"), backend="fused").to(device)
    z = [torch.randn(1, 2, n, n, device=device) for n in (4, 2, 1)]
    target = torch.zeros(1, 1, 4, 4, device=device)
    for last in (-1, -2):
        loss.losses(z, target, [*loss.maps[:4], loss.maps[last]])
    assert fused.self_check.cache_info().misses == 1


@pytest.mark.parametrize("errors", [(0.0, torch.nan), (torch.nan, 0.0), (0.0, 0.1)])
def test_one_wrong_example_is_enough(errors, monkeypatch):
    monkeypatch.setattr(fused, "worst_error", lambda *args: errors[args[-1]])
    assert "wrong by" in fused.self_check((), 2, 3, False, False, torch.device("cpu"))


REASONS = ["Subtract", "deterministic", "float64", "the kernels failed", "wrong by", "device", "older than 3.3", "128"]


@pytest.mark.parametrize("reason", REASONS)
def test_says_why_it_cannot_be_used_and_another_backend_computes(reason, device, monkeypatch, caplog):
    operators, dtype, classes = ("add",), torch.float32, 3
    if reason == "Subtract":
        operators = ("subtract",)
    elif reason == "float64":
        dtype = torch.float64
    elif reason == "128":
        classes = 129
    elif reason == "device":
        device = torch.device("cpu")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    elif reason == "older than 3.3":
        monkeypatch.setattr(fused, "has_triton", lambda: False)
    elif reason == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    elif reason == "wrong by":
        monkeypatch.setattr(fused.FusedEvaluator, "_launch", lambda self, *args: None)
    elif reason == "the kernels failed":
        monkeypatch.setattr(fused.FusedEvaluator, "_launch", lambda self, *args: 1 / 0)
    outputs, target = oracle.example([(4, 6), (2, 3)], classes=classes)
    z, target = [torch.from_numpy(o).to(device, dtype) for o in outputs], torch.from_numpy(target).to(device)
    named, automatic = (LoMixLoss(classes, 2, operators, backend=name).to(device, dtype) for name in ("fused", None))
    values = [loss.losses(z, target) for loss in (named, named, automatic)]
    assert torch.equal(values[0], values[2])
    (record,) = warnings(caplog)
    assert record.getMessage().startswith("LoMix: the backend 'plain' computes the loss of")
    assert "'fused' can't be used: " in record.getMessage() and reason in record.getMessage()
