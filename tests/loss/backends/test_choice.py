"""Which backend is chosen: a rule of the case alone, and logged once."""

import logging

import pytest
import torch

from nnunet_lomix.loss import BACKENDS, LoMixLoss
from nnunet_lomix.loss.backends import Case, choose, fused, plain
from nnunet_lomix.loss.criterion import ClassCriterion


def chosen(device):
    case = Case([], {}, ClassCriterion(), 3, 2, torch.device(device), torch.float32)
    name, backend, refusals = choose(case)
    assert isinstance(backend, BACKENDS[name])
    return name, refusals


@pytest.mark.parametrize(
    ("device", "why_not_fused", "expected"),
    [
        ("cpu", None, "plain"),
        ("mps", None, "plain"),
        ("cuda", None, "fused"),
        ("cuda", "Triton is not installed", "plain"),
    ],
)
def test_the_rule(device, why_not_fused, expected, monkeypatch):
    monkeypatch.setattr(fused.Fused, "unsupported", staticmethod(lambda case: why_not_fused))
    monkeypatch.setattr(fused.Fused, "__init__", lambda self, case: None)
    assert chosen(device) == (expected, {"fused": why_not_fused} if why_not_fused else {})


@pytest.mark.parametrize(("priority", "expected"), [(-1, "plain"), (5, "eager")])
def test_a_backend_of_ones_own_has_its_priority(priority, expected, monkeypatch):
    class Eager(plain.Plain):
        pass

    Eager.priority = priority
    monkeypatch.setitem(BACKENDS, "eager", Eager)
    assert chosen("cpu")[0] == expected


def test_a_backend_that_cannot_be_made_is_nobody_elses_trouble(monkeypatch):
    class Broken(plain.Plain):
        priority = -5

        def __init__(self, case):
            raise RuntimeError("no such accelerator")

    monkeypatch.setitem(BACKENDS, "broken", Broken)
    assert chosen("cpu")[0] == "plain"


def test_without_any_backend_the_reasons_are_told(monkeypatch):
    for name, backend in BACKENDS.items():
        monkeypatch.setattr(backend, "unsupported", staticmethod(lambda case, name=name: f"{name} rests on Sundays"))
    with pytest.raises(RuntimeError, match="no backend supports this loss: .*plain rests on Sundays"):
        chosen("cpu")


def test_what_was_chosen_is_logged_once(caplog):
    caplog.set_level(logging.INFO, "nnunet_lomix")
    loss, target = LoMixLoss(2, 2), torch.zeros(1, 1, 4, 4)
    for _ in range(2):
        loss([torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)], target)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.name.startswith("nnunet_lomix")
    assert record.getMessage() == "LoMix: the backend 'plain' computes the loss of 6 maps"
