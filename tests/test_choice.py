"""Which backend is taken: the rule, and the trial that a GPU would hold, here with backends of the tests' own."""

import weakref
from functools import cache
from time import sleep
from types import SimpleNamespace

import pytest
import torch

from nnunet_lomix import LoMixLoss
from nnunet_lomix.backends import BACKENDS, choice, compiled
from nnunet_lomix.backends.base import log_once
from nnunet_lomix.terms import Statistics

from . import oracle
from .test_compiled import compiler_that
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
        (0, True, True, None, ["lean", "compiled", "fused"]),
        (10**9, False, True, None, ["plain", "lean", "fused"]),
    ],
)
def test_candidates(most, compile, cuda, why_not_fused, names, monkeypatch, caplog):
    monkeypatch.setattr(choice, "MOST_VALUES_FOR_PLAIN", most)
    monkeypatch.setattr(choice, "unsupported", lambda *args: why_not_fused)
    output = SimpleNamespace(numel=lambda: 100, is_cuda=cuda)
    assert choice.candidates([output], [None], None, compile) == names
    assert caplog.messages == [f"LoMix: the backend 'fused' isn't used: {why}" for why in (why_not_fused,) if why]


def slow(*args):
    sleep(0.05)
    return BACKENDS["plain"](*args)


def wrong(*args):
    s = BACKENDS["plain"](*args)
    return Statistics(1.1 * s.cross_entropy, s.intersection, s.volume)


class Tampered(torch.autograd.Function):
    """The same forward; backward the derivatives by the statistics, changed by a function."""

    @staticmethod
    def forward(ctx, tamper, *statistics):
        ctx.tamper = tamper
        return tuple(s.clone() for s in statistics)

    @staticmethod
    def backward(ctx, *gradients):
        return None, *ctx.tamper(*gradients)


WRONG_GRADIENTS = {
    "negated": lambda *by: [-g for g in by],
    "other_maps": lambda *by: [g.flip(0) for g in by],
    "other_classes": lambda *by: [by[0], *(g.flip(2) for g in by[1:])],
    "without_volume": lambda *by: [by[0], by[1], torch.zeros_like(by[2])],
}


def wrong_gradient(tamper):
    return lambda *args: Statistics(*Tampered.apply(tamper, *vars(BACKENDS["plain"](*args)).values()))


def failing(*args):
    raise RuntimeError("out of registers")


@pytest.fixture
def loss(monkeypatch):
    """A function that gives the losses, and how many trials there were, with backends of these names to choose from."""
    wrong_gradients = {name: wrong_gradient(tamper) for name, tamper in WRONG_GRADIENTS.items()}
    for name, backend in ({"slow": slow, "wrong": wrong, "failing": failing} | wrong_gradients).items():
        monkeypatch.setitem(BACKENDS, name, backend)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    trials = []
    original = choice.trial
    monkeypatch.setattr(choice, "trial", lambda name, *args: trials.append(name) or original(name, *args))
    module = LoMixLoss(3, 3)
    arrays = oracle.example([(4, 3), (2, 2), (1, 2)])

    def compute(names, maps=None):
        monkeypatch.setattr(choice, "candidates", lambda *args: names)
        return module.losses(*tensors(*arrays, torch.float32), maps), list(trials)

    compute.module, (compute.outputs, _) = module, arrays
    return compute


@pytest.mark.parametrize(
    "names, best, reason",
    [
        (["slow", "plain"], "plain", None),
        (["plain", "slow"], "plain", None),
        (["slow", "wrong"], "slow", "'wrong' isn't used, it differs from the others by up to "),
        *((["slow", name], "slow", f"{name!r} isn't used, it differs") for name in WRONG_GRADIENTS),
        (["slow", "failing"], "slow", "'failing' isn't used, it failed (RuntimeError: out of registers)"),
        (["failing", "slow"], "slow", "'failing' isn't used, it failed (RuntimeError: out of registers)"),
    ],
)
def test_the_fastest_that_works_is_chosen(names, best, reason, loss, caplog):
    loss(names)
    assert list(choice.chosen.values()) == [best]
    *others, choice_made = caplog.messages
    assert [reason in message for message in others] == [True] * bool(reason)
    assert f"the backend {best!r} computes the loss of 19 maps" in choice_made


def test_what_cannot_be_compiled_is_not_chosen(loss, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", compiler_that(RuntimeError("no compiler")))
    monkeypatch.setattr(compiled, "failed", set())
    monkeypatch.setattr(compiled, "compile_once", cache(compiled.compile_once.__wrapped__))
    loss(["slow", "compiled"])
    assert list(choice.chosen.values()) == ["slow"]
    _, why, choice_made = caplog.messages
    assert why.endswith("RuntimeError: no compiler") and "compiled" not in choice_made


def test_a_case_is_tried_once_whatever_the_sample_of_mutants(loss):
    losses, _ = loss(["slow", "plain"])
    again, trials = loss(["slow", "plain"], loss.module.maps[:-1])
    assert trials == ["slow", "plain"]
    torch.testing.assert_close(again, losses[:-1])


def test_one_map_does_not_decide_for_all(loss):
    loss(["slow", "plain"], loss.module.maps[:1])  # as where a rule measures alignment
    _, trials = loss(["slow", "plain"])
    assert trials == ["slow", "plain"] * 2


def test_a_trial_leaves_no_trace_in_the_training(loss):
    state = torch.get_rng_state()
    losses, _ = loss(["slow", "plain"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in loss.module.parameters())
    gradients = torch.autograd.grad(losses.sum(), list(loss.module.mixers.parameters()))
    choice.chosen.clear()
    expected, _ = loss(["plain"])
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), list(loss.module.mixers.parameters())))


def test_gradients_of_a_turn_are_gone_in_the_next(loss, monkeypatch):
    earlier, original = [], torch.autograd.grad

    def grad(*args, **kwargs):
        assert all(of_output() is None for of_output in earlier)
        gradients = original(*args, **kwargs)
        earlier.extend(weakref.ref(g) for g in gradients if g.ndim == 4)
        return gradients

    monkeypatch.setattr(torch.autograd, "grad", grad)
    loss(["plain", "slow"])
    assert len(earlier) == 2 * choice.TURNS * 3 and len(choice.chosen) == 1


def test_no_trial_in_evaluation(loss):
    with torch.inference_mode():
        _, trials = loss(["slow", "plain"])
    assert not trials and not choice.chosen


def test_outputs_that_are_not_finite_decide_nothing(loss, caplog):
    loss.outputs[0][0, 0, 0, 0] = float("nan")
    loss(["slow", "plain"])
    assert not choice.chosen and not caplog.messages


def test_an_error_of_the_device_is_not_hidden(loss, monkeypatch):
    def broken(device):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        loss(["slow", "plain"])


def test_all_backends_agree_in_a_trial(loss, monkeypatch, caplog):
    pytest.importorskip("triton")
    monkeypatch.setattr(compiled, "compile_once", lambda function: function)
    monkeypatch.setattr(choice, "TURNS", 2)  # the interpreter is slow
    loss(["plain", "lean", "compiled", "fused"])
    assert len(choice.chosen) == 1 and not any("isn't used" in message for message in caplog.messages)


def test_where_all_fail_the_error_is_seen(loss):
    with pytest.raises(RuntimeError, match="out of registers"):
        loss(["failing", "failing"])
