"""Which backend is chosen: a rule of the case alone, and logged once."""

import logging

import pytest
import torch

from nnunet_lomix.loss import BACKENDS, LoMixLoss
from nnunet_lomix.loss.backends import Case, choose, fused
from nnunet_lomix.loss.criterion import Criterion


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
    case = Case([], {}, Criterion(), 3, 2, torch.device(device), torch.float32)
    name, backend, refusal = choose(case)
    assert name == expected and isinstance(backend, BACKENDS[name])
    assert refusal == (f"'fused' can't be used: {why_not_fused}" if why_not_fused else None)


def test_what_was_chosen_is_logged_once(caplog):
    caplog.set_level(logging.INFO, "nnunet_lomix")
    loss, target = LoMixLoss(2, 2), torch.zeros(1, 1, 4, 4)
    for _ in range(2):
        loss([torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)], target)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.name.startswith("nnunet_lomix")
    assert record.getMessage() == "LoMix: the backend 'plain' computes the loss of 6 maps"
