"""Which backend is chosen: a rule of the case alone, and logged once."""

import logging

import pytest
import torch

from nnunet_lomix.loss import BACKENDS, LoMixLoss
from nnunet_lomix.loss.backends import Case, choose, fused, plain
from nnunet_lomix.loss.criterion import ClassCriterion

LARGE, SMALL = torch.Size((2, 14, 128, 128, 128)), torch.Size((2, 3, 8, 8))


def chosen(device, shape, maps=(), backends=None):
    case = Case(torch.device(device), torch.float32, shape, maps, ClassCriterion())
    return choose(case, backends or {name: make() for name, make in BACKENDS.items()})


@pytest.mark.parametrize(
    ("device", "shape", "why_not_fused", "expected"),
    [
        ("cpu", SMALL, None, "plain"),
        ("cpu", LARGE, None, "lean"),
        ("mps", LARGE, None, "lean"),
        ("cuda", SMALL, None, "plain"),
        ("cuda", LARGE, None, "fused"),
        ("cuda", LARGE, "Triton is not installed", "lean"),
    ],
)
def test_the_rule(device, shape, why_not_fused, expected, monkeypatch):
    monkeypatch.setattr(fused.Fused, "unsupported", lambda self, case: why_not_fused)
    name, refusals = chosen(device, shape, maps=[None] * 48)
    assert name == expected
    assert refusals == [f"'fused' can't be used: {why}" for why in (why_not_fused,) if why]


def test_plain_where_all_maps_together_are_small():
    shape = torch.Size((1, 2, 1024, 1024))
    limit = plain.MOST_VALUES // shape.numel()
    assert chosen("cpu", shape, [None] * limit)[0] == "plain"
    assert chosen("cpu", shape, [None] * (limit + 1))[0] == "lean"


@pytest.mark.parametrize(("priority", "expected"), [(-1, "lean"), (5, "eager")])
def test_a_backend_of_ones_own_has_its_priority(priority, expected):
    class Eager(BACKENDS["plain"]):
        def suits(self, case):
            return True

    Eager.priority = priority
    backends = {name: make() for name, make in BACKENDS.items()} | {"eager": Eager()}
    assert chosen("cpu", LARGE, [None] * 48, backends)[0] == expected


def test_without_any_backend_the_reasons_are_told():
    class Never(BACKENDS["lean"]):
        def unsupported(self, case):
            return "it is Sunday"

    with pytest.raises(RuntimeError, match="no backend supports this loss: 'never' can't be used: it is Sunday"):
        chosen("cpu", LARGE, [], {"never": Never()})


def test_what_was_chosen_is_logged_once(caplog):
    caplog.set_level(logging.INFO, "nnunet_lomix")
    loss, target = LoMixLoss(2, 2), torch.zeros(1, 1, 4, 4)
    for _ in range(2):
        loss([torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)], target)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.name.startswith("nnunet_lomix")
    assert record.getMessage() == "LoMix: the backend 'plain' computes the loss of 6 maps"
