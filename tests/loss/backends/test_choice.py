"""Which backend is chosen: a rule of the case alone, and logged once."""

import logging

import pytest
import torch

from nnunet_lomix.loss import BACKENDS, LoMixLoss
from nnunet_lomix.loss.backends import Case, choose, fused, plain
from nnunet_lomix.loss.criterion import ClassCriterion

LARGE, SMALL = torch.Size((2, 14, 128, 128, 128)), torch.Size((2, 3, 8, 8))


def chosen(device, shape, evaluated=48):
    case = Case(torch.device(device), torch.float32, shape, [], evaluated, ClassCriterion())
    name, backend, refusals = choose(case)
    assert isinstance(backend, BACKENDS[name])
    return name, refusals


@pytest.mark.parametrize(
    ("device", "shape", "why_not_fused", "expected"),
    [
        ("cpu", SMALL, None, "plain"),
        ("cpu", LARGE, None, "lean"),
        ("mps", LARGE, None, "lean"),
        ("cuda", SMALL, None, "fused"),
        ("cuda", LARGE, None, "fused"),
        ("cuda", SMALL, "Triton is not installed", "plain"),
        ("cuda", LARGE, "Triton is not installed", "lean"),
    ],
)
def test_the_rule(device, shape, why_not_fused, expected, monkeypatch):
    monkeypatch.setattr(fused.Fused, "unsupported", lambda self, case: why_not_fused)
    assert chosen(device, shape) == (expected, {"fused": why_not_fused} if why_not_fused else {})


def test_plain_where_all_evaluated_maps_together_are_small():
    shape = torch.Size((1, 2, 1024, 1024))
    limit = plain.MOST_VALUES // shape.numel()
    assert chosen("cpu", shape, limit)[0] == "plain"
    assert chosen("cpu", shape, limit + 1)[0] == "lean"


@pytest.mark.parametrize(("priority", "expected"), [(-1, "lean"), (5, "eager")])
def test_a_backend_of_ones_own_has_its_priority(priority, expected, monkeypatch):
    class Eager(plain.Plain):
        def suits(self, case):
            return True

    Eager.priority = priority
    monkeypatch.setitem(BACKENDS, "eager", Eager)
    assert chosen("cpu", LARGE)[0] == expected


def test_a_backend_that_cannot_be_made_is_nobody_elses_trouble(monkeypatch):
    class Broken(plain.Plain):
        priority = -5

        def __init__(self):
            raise RuntimeError("no such accelerator")

    monkeypatch.setitem(BACKENDS, "broken", Broken)
    assert chosen("cpu", LARGE)[0] == "lean"


def test_without_any_backend_the_reasons_are_told(monkeypatch):
    for name, backend in BACKENDS.items():
        monkeypatch.setattr(backend, "unsupported", lambda self, case, name=name: f"{name} rests on Sundays")
    with pytest.raises(RuntimeError, match="no backend supports this loss: .*lean rests on Sundays"):
        chosen("cpu", LARGE)


@pytest.mark.parametrize("backend", ["plain", "lean"])
def test_chosen_maps_are_each_computed_once_and_given_in_order(backend, device):
    loss = LoMixLoss(2, 2, backend=backend).to(device)
    outputs = [torch.randn(1, 2, n, n, device=device) for n in (4, 2)]
    target = torch.zeros(1, 1, 4, 4, device=device)
    everything = loss.losses(outputs, target)
    calls = []
    loss.operators["multiply_0_1"].register_forward_hook(lambda *args: calls.append(1))
    numbers = torch.tensor([3, 0, 3, 1, 5], device=device)
    torch.testing.assert_close(loss.losses(outputs, target, numbers), everything[numbers])
    assert len(calls) <= 1


def test_what_was_chosen_is_logged_once(caplog):
    caplog.set_level(logging.INFO, "nnunet_lomix")
    loss, target = LoMixLoss(2, 2), torch.zeros(1, 1, 4, 4)
    for _ in range(2):
        loss([torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)], target)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.name.startswith("nnunet_lomix")
    assert record.getMessage() == "LoMix: the backend 'plain' computes the loss of 6 maps"
