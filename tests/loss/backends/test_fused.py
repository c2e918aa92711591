"""The Triton kernels equal the plain backend: on CUDA, or where there is none by Triton's interpreter.

And this equals the oracle: test_lomix.py.
"""

import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_lomix import LoMixLoss
from nnunet_lomix.loss import DEFAULT_OPERATORS
from nnunet_lomix.loss.backends import Case, fused
from nnunet_lomix.loss.criterion import Criterion

from .. import oracle
from ..test_lessons import assert_takes_as_little_as_nnunets
from ..test_lomix import LAYOUTS, TABLE, a_case, build, cases, tensors

pytest.importorskip("triton")
from nnunet_lomix.loss.backends import kernels  # noqa: E402  imports Triton

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: there are no graphs and no waits here")
self_check = fused.self_check


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and several programs for a sample, the last block not full."""
    monkeypatch.setattr(fused, "VALUES_OF_WARP", 2**5)
    monkeypatch.setattr(fused, "PROGRAMS", 2**6)
    monkeypatch.setattr(fused, "self_check", lambda *args: None)  # has tests of its own


def warnings(caplog):
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def results(case, backend, device, dtype=torch.float32, arrange=torch.clone):
    """Losses and all gradients."""
    loss, *arrays = build(case, backend, device, dtype)
    z, target = tensors(*arrays, device, dtype)
    losses = loss.losses([arrange(x) for x in z], arrange(target))
    factors = torch.linspace(0.5, 2, len(losses), device=device, dtype=dtype)
    leaves = [*z, *loss.operators.parameters()]
    return [losses, *torch.autograd.grad((factors * losses).sum(), leaves, materialize_grads=True)]


def assert_equals_plain(case, device, **kwargs):
    exact = results(case, "plain", device, torch.float64, **kwargs)
    for ours, theirs in zip(results(case, "fused", device, **kwargs), exact, strict=True):
        # 1e-6: a gradient that is zero but for rounding is a sum of terms of about 1
        tolerance = 1e-6 + 1e-4 * theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("name", TABLE)
def test_losses_and_gradients_equal_those_of_the_plain_backend(name, device, caplog):
    assert_equals_plain(TABLE[name], device)
    assert not warnings(caplog)  # it was fused that computed


@settings(max_examples=4, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(DEFAULT_OPERATORS).filter(lambda case: case[0]["num_scales"] <= 3))  # the interpreter is slow
def test_equals_the_plain_backend_in_any_case(device, case):
    assert_equals_plain(case, device)


SMALL = a_case(3, (5, 7), (3, 4), stride=2)


def test_layout_in_memory_does_not_matter(device):
    assert_equals_plain(SMALL, device, arrange=LAYOUTS["axes in another order"])


def test_slabs_are_added_up(device, monkeypatch):
    monkeypatch.setattr(fused.Fused, "pixels_at_once", lambda *args: 1)
    assert_equals_plain(SMALL, device)


def test_two_runs_give_the_same_bits_and_may_be_asked_to(device, caplog):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (results(SMALL, "fused", device) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not warnings(caplog)


def test_parameters_that_are_replaced_are_those_that_count(device):
    """By load_state_dict(…, assign=True), functional_call, and whatever shards parameters."""
    loss, *arrays = build(SMALL, "fused", device, torch.float32)
    z, target = tensors(*arrays, device, torch.float32)
    loss.losses(z, target)
    other, *_ = build((*SMALL[:3], 7, 1), "plain", device, torch.float32)
    loss.load_state_dict(other.state_dict(), assign=True)
    losses = loss.losses(z, target)
    torch.testing.assert_close(losses, other.losses(z, target))
    losses.sum().backward()
    assert all(p.grad is not None for p in loss.operators.parameters())


def test_a_backward_pass_under_autocast_is_possible(device):
    """PyTorch advises against it: its own matrix products are in half precision then, the kernels' inputs never."""
    gradients = []
    for autocast in (False, True):
        loss, *arrays = build(SMALL, "fused", device, torch.float32)
        z, target = tensors(*arrays, device, torch.float32)
        losses = loss.losses(z, target)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            losses.sum().backward()
        gradients.append([x.grad for x in z])
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.01)


# Memory


class Fenced:
    """A kernel whose tensors lie in the middle of larger ones, of numbers that would be seen."""

    def __init__(self, kernel, number):
        self.kernel = kernel
        self.number = number
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)

        def launch(*args, **kwargs):
            fenced = []
            self.kernel[grid](*(self.fence(arg, fenced) for arg in args), **kwargs)
            for tensor, inner, outer in fenced:
                tensor.copy_(inner)
                inner.fill_(outer[0])
                torch.testing.assert_close(outer, outer[:1].expand_as(outer), rtol=0, atol=0, equal_nan=True)

        return launch

    def fence(self, arg, fenced):
        """A copy of a tensor in a larger one; both are noted beside the original."""
        if not isinstance(arg, torch.Tensor):
            return arg
        number = self.number if arg.is_floating_point() else 10**6
        outer = torch.full((3 * max(arg.numel(), 500),), number, dtype=arg.dtype, device=arg.device)
        inner = outer[len(outer) // 3 :][: arg.numel()].view(arg.shape)
        fenced.append((arg, inner.copy_(arg), outer))
        return inner


# NaN isn't lost in what it is multiplied by, a number isn't lost in what is added to it
@pytest.mark.parametrize(("number", "regions"), [(torch.nan, False), (torch.nan, True), (1000, True)])
def test_kernels_write_to_their_own_memory_only_and_use_no_other(number, regions, device, monkeypatch, caplog):
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(kernels, name, Fenced(getattr(kernels, name), number))
    assert_equals_plain(a_case(3, (5, 7), (5, 4), (2, 2), mixed_scales=2, regions=regions, ignore_label=3), device)
    assert not warnings(caplog)
    assert kernels.backward_kernel.grids == [(5, 2)]  # blocks of 8 pixels, of two samples


# Precision


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


# What the host does


class Operations(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


# what makes the host wait for a GPU, or copies something new from the host to it
WAITING = ("_local_scalar_dense", "nonzero", "unique", "lift_fresh", "item", "equal", "masked_select", "bincount")


def launch_nothing(monkeypatch):
    """Kernels that do nothing; gives how often each is launched."""
    launches = Counter()
    for name in ("forward_kernel", "backward_kernel"):
        kernel = mock.MagicMock()
        kernel.__getitem__.return_value = lambda *args, name=name, **kwargs: launches.update([name])
        monkeypatch.setattr(kernels, name, kernel)
    return launches


class NoAnchor(torch.nn.Module):
    """nnU-Net's own loss in its place takes as many operations as it takes."""

    def forward(self, outputs, target):
        return torch.zeros(())


def count_operations(monkeypatch, size, batch, **kwargs):
    """Those of the third step of a training; kernels count as one each, and do nothing."""
    launches = launch_nothing(monkeypatch)
    monkeypatch.setattr(Criterion, "check_values", lambda *args: None)  # of every step on the CPU only
    loss = LoMixLoss(3, 4, backend="fused", stride=2, **kwargs)
    outputs = [torch.zeros(batch, 3, *(n // 2**j for n in size), requires_grad=True) for j in range(4)]
    target = torch.zeros(batch, 1, *size)
    for _ in range(3):  # the first one makes what is kept
        launches.clear()
        for leaf in [*outputs, *loss.parameters()]:
            leaf.grad = None
        with Operations() as operations:
            loss(outputs, target).backward()
    found = [name for name in operations.counts if any(name.startswith(f"aten.{each}.") for each in WAITING)]
    assert not found
    return sum(operations.counts.values()), launches, operations.counts


# with views, which cost the host time and the device none
@pytest.mark.parametrize(("kwargs", "at_most"), [({"anchor": NoAnchor()}, 173), ({}, 250)])
def test_a_step_has_a_constant_number_of_operations_and_waits_for_nothing(kwargs, at_most, monkeypatch):
    counts = [count_operations(monkeypatch, size, batch, **kwargs) for size, batch in (((16, 16), 2), ((40, 24), 7))]
    assert counts[0] == counts[1]
    number, launches, operations = counts[0]
    assert launches == {"forward_kernel": 1, "backward_kernel": 1}
    assert number <= at_most, operations


@pytest.mark.parametrize(
    ("size", "scales", "classes", "stride"), [((64, 64, 64), 5, 3, 2), ((256, 256), 6, 14, 2), ((256, 256), 6, 4, 1)]
)
def test_memory_is_at_most_that_of_nnunets_own_loss(size, scales, classes, stride, monkeypatch):
    """Twice that on every pixel."""
    monkeypatch.setattr(fused, "LEAST_MEMORY", 0)
    monkeypatch.setattr(Criterion, "check_values", lambda *args: None)  # once on a GPU
    launch_nothing(monkeypatch)
    sizes = [tuple(max(1, n // 2**j) for n in size) for j in range(scales)]
    loss = LoMixLoss(classes, scales, backend="fused", share=0, stride=stride)
    assert_takes_as_little_as_nnunets(loss, sizes, classes, 1 if stride == 2 else 2)


@on_a_gpu
def test_a_step_never_waits_for_the_gpu(device):
    loss = LoMixLoss(3, 3, stride=2).to(device)
    z = [torch.randn(2, 3, n, n, device=device, requires_grad=True) for n in (32, 16, 8)]
    target = torch.randint(3, (2, 1, 32, 32), device=device)
    for _ in range(2):
        loss(z, target).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(z, target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_a_step_can_be_captured_in_a_graph(device):
    loss = LoMixLoss(3, 3, stride=2, backend="fused").to(device)
    z = [torch.randn(2, 3, n, n, device=device, requires_grad=True) for n in (32, 16, 8)]
    target = torch.randint(3, (2, 1, 32, 32), device=device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(4):  # a cycle
            loss(z, target).backward()
        expected = [x.grad.clone() for x in z]
        for x in [*z, *loss.parameters()]:
            x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss(z, target).backward()
    for x in z:
        x.grad.zero_()
    for _ in range(4):  # the grid moves in a graph, too
        graph.replay()
    for x, grad in zip(z, expected, strict=True):
        torch.testing.assert_close(x.grad, grad, rtol=1e-4, atol=1e-6)


# Whether it serves


# the interpreter takes what the compiler refuses; an A100 and an H100 are compiled for without one
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus_without_spills(capability):
    code = f"""
import re
from kernels import compile_for
from nnunet_lomix.loss.backends import kernels
for case in (4, 14, False, False), (3, 1, True, True), (5, 32, False, True), (2, 70, False, False):
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        code = compile_for({capability}, kernel, *case).asm
        assert code["cubin"] and ".local" not in code["ptx"], case
        assert not re.search(r"\\b(atom|red)\\.", code["ptx"])  # which would add in no fixed order
"""
    benchmarks = Path(__file__).parents[3] / "benchmarks"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=benchmarks)


def case_of(device, regions=False):
    loss = LoMixLoss(3, 3, mixed_scales=2, regions=regions, ignore_label=3).to(device)
    return Case(loss.maps, dict(loss.operators.items()), loss.criterion, 3, 3, device, torch.float32)


@pytest.mark.parametrize("regions", [False, True])
def test_the_check_finds_the_kernels_right(regions, device, monkeypatch):
    monkeypatch.setattr(fused, "TOLERANCE", 1e-4)
    monkeypatch.setattr(fused, "REASONS", {})
    with torch.inference_mode():  # a validation comes first
        assert self_check(case_of(device, regions)) is None


@pytest.mark.parametrize(
    ("launch", "reason"),
    [(lambda *args, **kwargs: None, "wrong by up to"), (lambda *args, **kwargs: 1 / 0, "failed on this device")],
)
def test_the_check_finds_kernels_that_do_not_work_and_warns_once(launch, reason, device, monkeypatch, caplog):
    monkeypatch.setattr(fused, "REASONS", {})
    monkeypatch.setattr(kernels, "backward_kernel", mock.MagicMock(**{"__getitem__.return_value": launch}))
    for _ in range(2):
        assert reason in self_check(case_of(device))
    (record,) = warnings(caplog)
    assert "takes the place of 'fused'" in record.getMessage() and reason in record.getMessage()


REASONS = ["Subtract", "float64", "the kernels failed", "device", "older than 3.3", "128"]


@pytest.mark.parametrize("reason", REASONS)
def test_says_why_it_cannot_be_used_and_plain_computes(reason, device, monkeypatch, caplog):
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
    else:
        monkeypatch.setattr(fused, "self_check", lambda *args: reason)
    outputs, target = oracle.example([(4, 6), (2, 3)], classes=classes)
    z, target = [torch.from_numpy(o).to(device, dtype) for o in outputs], torch.from_numpy(target).to(device)
    named, expected = (LoMixLoss(classes, 2, operators, backend=b).to(device, dtype) for b in ("fused", "plain"))
    values = [loss.losses(z, target) for loss in (named, named, expected)]
    assert torch.equal(values[0], values[2])
    (record,) = warnings(caplog)
    assert record.getMessage().startswith("LoMix: the backend 'plain' computes the loss of")
    assert "'fused' can't be used: " in record.getMessage() and reason in record.getMessage()


def test_too_little_memory_for_the_check_is_no_verdict(device, monkeypatch):
    monkeypatch.setattr(fused, "REASONS", {})
    worst_error = mock.Mock(side_effect=[torch.OutOfMemoryError, 0.0])
    monkeypatch.setattr(fused, "worst_error", worst_error)
    assert "no memory" in self_check(case_of(device))
    assert self_check(case_of(device)) is None
