"""Which backend is taken: the rule, and the trial that a GPU would hold, here with backends of the tests' own."""

from time import sleep
from types import SimpleNamespace

import pytest
import torch

from nnunet_lomix import LoMixLoss
from nnunet_lomix.backends import BACKENDS, choice
from nnunet_lomix.backends.base import log_once
from nnunet_lomix.terms import Statistics

from . import oracle
from .test_loss import tensors


@pytest.fixture(autouse=True)
def nothing_chosen_yet(monkeypatch):
    monkeypatch.setattr(choice, "chosen", {})
    log_once.cache_clear()


@pytest.mark.parametrize(
    "most, compile, cuda, why_not_fused, names",
    [
        (10**9, False, False, None, ["plain"]),
        (10**9, True, False, None, ["plain"]),
        (0, False, False, None, ["lean"]),
        (0, True, False, None, ["compiled"]),
        (0, False, True, "no Triton", ["lean"]),
        (0, True, True, None, ["compiled", "fused"]),
        (10**9, False, True, None, ["plain", "lean", "fused"]),
    ],
)
def test_candidates(most, compile, cuda, why_not_fused, names, monkeypatch):
    monkeypatch.setattr(choice, "MOST_VALUES_FOR_PLAIN", most)
    monkeypatch.setattr(choice, "unsupported", lambda *args: why_not_fused)
    output = SimpleNamespace(numel=lambda: 100, is_cuda=cuda)
    assert choice.candidates([output], [None], None, compile) == names


def slow(*args):
    sleep(0.05)
    return BACKENDS["plain"](*args)


def wrong(*args):
    s = BACKENDS["plain"](*args)
    return Statistics(1.1 * s.cross_entropy, s.intersection, s.volume)


def wrong_gradient(*args):
    s = BACKENDS["plain"](*args)
    return Statistics(s.cross_entropy.detach(), s.intersection, s.volume)


def failing(*args):
    raise RuntimeError("out of registers")


@pytest.fixture
def loss(monkeypatch):
    """A function that gives the losses, and how many trials there were, with backends of these names to choose from."""
    for backend in (slow, wrong, wrong_gradient, failing):
        monkeypatch.setitem(BACKENDS, backend.__name__, backend)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    trials = []
    original = choice.trial
    monkeypatch.setattr(choice, "trial", lambda name, *args: trials.append(name) or original(name, *args))
    module = LoMixLoss(3, 3)
    arrays = oracle.example([(9, 7), (5, 4), (3, 2)])

    def compute(names, maps=None):
        monkeypatch.setattr(choice, "candidates", lambda *args: names)
        return module.losses(*tensors(*arrays, torch.float32), maps), list(trials)

    compute.module = module
    return compute


@pytest.mark.parametrize(
    "names, best, reason",
    [
        (["slow", "plain"], "plain", None),
        (["plain", "slow"], "plain", None),
        (["slow", "wrong"], "slow", "'wrong' isn't used, it differs from the others by up to 10."),
        (["slow", "wrong_gradient"], "slow", "'wrong_gradient' isn't used, it differs"),
        (["slow", "failing"], "slow", "'failing' isn't used, it failed (RuntimeError: out of registers)"),
        (["failing", "slow"], "slow", "'failing' isn't used, it failed (RuntimeError: out of registers)"),
    ],
)
def test_the_fastest_that_works_is_chosen(names, best, reason, loss, caplog):
    loss(names)
    assert list(choice.chosen.values()) == [best]
    assert [reason in message for message in caplog.messages] == [True] * bool(reason)


def test_a_case_is_tried_once_whatever_the_sample_of_mutants(loss):
    losses, _ = loss(["slow", "plain"])
    again, trials = loss(["slow", "plain"], loss.module.maps[:-1])
    assert trials == ["slow", "plain"]
    torch.testing.assert_close(again, losses[:-1])


def test_a_trial_leaves_no_trace_in_the_training(loss):
    losses, _ = loss(["slow", "plain"])
    assert all(p.grad is None for p in loss.module.parameters())
    losses.sum().backward()
    expected, _ = loss(["plain"])
    torch.testing.assert_close(losses, expected)


def test_where_all_fail_the_error_is_seen(loss):
    with pytest.raises(RuntimeError, match="out of registers"):
        loss(["failing", "failing"])
