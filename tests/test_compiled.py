"""The compiled backend equals the plain one: its formulas by themselves, and when they are really compiled."""

import shutil
from functools import cache
from logging import WARNING

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from nnunet_lomix import LoMixLoss
from nnunet_lomix.backends import compiled, lean
from nnunet_lomix.backends.base import log_once

from . import oracle
from .test_loss import FIVE_SCALES, build, cases, tensors

# not as many classes as scales: where two sizes are equal, torch.compile takes them for one
CLASSES = {"num_classes": 2, "num_scales": 3, "ignore_label": 2, "batch_dice": True}
COMPILED = "LoMix: the loss is compiled; its first step takes longer, 20 s or so (nnUNet_compile=f avoids it)"
REGIONS = {"num_classes": 2, "num_scales": 3, "regions": True}


@pytest.fixture(autouse=True)
def compile_anew(monkeypatch):
    monkeypatch.setattr(compiled, "failed", set())
    monkeypatch.setattr(compiled, "compile_once", cache(compiled.compile_once.__wrapped__))
    torch._dynamo.reset()
    log_once.cache_clear()


def compiler_that(error):
    """In the place of torch.compile: its functions raise the error when they are called."""

    def compile(function, **kwargs):
        def call(*args):
            raise error

        return call

    return compile


def messages(caplog):
    """Our warnings; torch.compile has much to say, too."""
    return [text for name, level, text in caplog.record_tuples if name.startswith("nnunet_lomix") and level == WARNING]


def losses_and_gradients(loss, outputs, target, maps=None):
    losses = loss.losses(outputs, target, maps)
    factors = torch.linspace(0.5, 2, len(losses), dtype=losses.dtype)
    leaves = [*outputs, *loss.mixers.parameters()]
    return [losses, *torch.autograd.grad((factors * losses).sum(), leaves, materialize_grads=True)]


def assert_equals_plain(case, dtype, tolerance):
    results = []
    for backend in ("compiled", "plain"):
        loss, *arrays = build(case, backend)
        results.append(losses_and_gradients(loss.to(dtype), *tensors(*arrays, dtype)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@example(case=FIVE_SCALES)
@given(case=cases())
def test_formulas_equal_plain_in_any_case(case, monkeypatch):
    monkeypatch.setattr(compiled, "compile_once", lambda function: function)
    assert_equals_plain(case, torch.float64, 1e-9)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("arguments", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_is_compiled_once_for_all_numbers_of_maps_and_pixels(arguments, monkeypatch, caplog):
    monkeypatch.setattr(lean, "VALUES", {"cpu": 400})  # pieces of different sizes
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    counters.clear()
    target_of = {"regions": arguments.get("regions", False), "ignore": "ignore_label" in arguments}
    arrays = oracle.example([(9, 7), (5, 4), (3, 2)], classes=arguments["num_classes"], **target_of)
    results = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for backend in ("compiled", "plain"):
            torch.manual_seed(0)
            loss = LoMixLoss(**arguments, backend=backend)
            for p in loss.mixers.parameters():
                torch.nn.init.normal_(p)
            some = [m for m in loss.maps if m.name not in ("add_0_1", "fusion_0_1_2", "z_2")]
            assert len(some) == len(loss.maps) - 3
            outputs, target = tensors(*arrays, torch.float32)
            results.append(sum((losses_and_gradients(loss, outputs, target, maps) for maps in (None, some)), []))
    assert messages(caplog) == [COMPILED]  # no fall-back
    assert counters["stats"]["unique_graphs"] == 4  # of statistics and fusion, and of their gradients
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("error", [TorchDynamoException, RuntimeError])  # the latter with TORCH_COMPILE_DISABLE=1
def test_lean_takes_over_where_compiling_fails_and_the_log_says_so_once(error, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", compiler_that(error("no compiler\nand so on")))
    results = []
    for backend in ("compiled", "compiled", "lean"):
        loss = LoMixLoss(3, 3, backend=backend)
        results.append(losses_and_gradients(loss, *tensors(*oracle.example([(9, 7), (5, 4), (3, 2)]), torch.float32)))
    for first, second, of_lean in zip(*results, strict=True):
        torch.testing.assert_close(first, of_lean)
        assert torch.equal(second, of_lean)
    assert messages(caplog) == [
        COMPILED,
        f"LoMix: the backend 'lean' takes the place of 'compiled': {error.__name__}: no compiler",
    ]
