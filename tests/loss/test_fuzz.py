"""Any values and any arguments: the loss is finite where it can be, says where it isn't, and refuses by a sentence.

Each test runs a few examples, always the same; FUZZ_EXAMPLES=2000 pytest tests/loss/test_fuzz.py runs as many new ones.
"""

import os
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_lomix import LoMixLoss
from nnunet_lomix.loss import DEFAULT_OPERATORS
from nnunet_lomix.loss.backends import fused

from . import oracle
from .test_lomix import a_case, cases

A_FEW = 30
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", A_FEW))
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == A_FEW,
    suppress_health_check=list(HealthCheck),
)
GREATEST = torch.finfo(torch.float32).max
SPECIAL = [torch.nan, torch.inf, -torch.inf, GREATEST, -GREATEST, 1e-45, 0.0, -0.0, 65504.0, 1e19, -1e30]
DTYPES_OF_TARGETS = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int16, torch.uint16,
    torch.int32, torch.int64,
]  # fmt: skip


A_CASE = cases(DEFAULT_OPERATORS)


@st.composite
def examples(draw, greatest_exponent, special=False, a_case=A_CASE):
    """Arguments of a loss, outputs from tiny logits up to a power of ten, some of them special, and a target."""
    arguments, sizes, batch, seed, _ = draw(a_case.filter(lambda case: case[0]["share"] < 1))
    classes, regions, ignores = (arguments[name] for name in ("num_classes", "regions", "ignore_label"))
    arrays, target = oracle.example(
        sizes, batch=batch, classes=classes, regions=regions, ignore=ignores is not None, seed=seed
    )
    if ignores is not None and not regions:
        arguments = arguments | {"ignore_label": draw(st.sampled_from([classes, 255, -1]))}
        target = np.where(target == classes, arguments["ignore_label"], target)
    outputs = [torch.from_numpy(z * 10.0 ** draw(st.integers(-3, greatest_exponent))).float() for z in arrays]
    for _ in range(draw(st.integers(0, 3)) if special else 0):
        z = draw(st.sampled_from(outputs)).view(-1)
        z[draw(st.integers(0, len(z) - 1))] = draw(st.sampled_from(SPECIAL))
    return arguments, outputs, torch.from_numpy(target)


def evaluate(arguments, outputs, target, dtype=torch.float32):
    """Loss of each map, total, and the gradients by outputs and parameters of a fresh loss."""
    loss = LoMixLoss(**arguments).to(dtype)
    outputs = [z.detach().to(dtype).requires_grad_() for z in outputs]
    total = loss(outputs, target)
    losses = loss.last_losses
    total.backward()
    gradients = [z.grad for z in outputs] + [p.grad for p in loss.parameters() if p.grad is not None]
    return loss, losses, total.detach(), gradients


@fuzz
@given(example=examples(greatest_exponent=8))
def test_logits_up_to_1e8_have_a_finite_loss_and_finite_gradients(example):
    _, losses, total, gradients = evaluate(*example)
    assert losses.isfinite().all() and total.isfinite()
    assert all(g.isfinite().all() for g in gradients)


@fuzz
@given(example=examples(greatest_exponent=37, special=True))
def test_no_value_is_hidden_and_none_breaks_the_state(example):
    """What isn't finite in double precision isn't in single precision either; the weights stay finite."""
    arguments, outputs, target = example
    loss, losses, total, _ = evaluate(arguments, outputs, target)
    _, exact, *_ = evaluate(arguments, outputs, target, torch.float64)
    assert not (losses.isfinite() & ~exact.isfinite()).any()
    assert set(loss.maps_not_finite()) == {m.name for m, x in zip(loss.maps, losses, strict=True) if not x.isfinite()}
    assert loss.weights().isfinite().all()
    assert all(t.isfinite().all() for t in loss.state_dict().values() if torch.is_tensor(t))
    assert total.isfinite() or not losses.isfinite().all() or losses.abs().max() > 1e30


ONE_KIND = [a_case(3, (5, 7), (3, 4), (2, 2), regions=regions, ignore_label=3) for regions in (False, True)]


@settings(fuzz, max_examples=max(1, EXAMPLES // 15))  # the interpreter is slow
@given(example=examples(greatest_exponent=37, special=True, a_case=st.sampled_from(ONE_KIND)))
def test_the_kernels_hide_no_value(device, example):
    """The same by Triton's interpreter, which needs no comparison with plain before each kind."""
    arguments, outputs, target = example
    outputs, target = [z.to(device) for z in outputs], target.to(device)
    loss = LoMixLoss(**arguments, backend="fused").to(device)
    with warnings.catch_warnings(), mock.patch.object(fused, "self_check", lambda case: None):
        warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter computes with numpy, which warns of NaN
        losses = loss.losses(outputs, target)
    exact = LoMixLoss(**arguments, backend="plain").double().to(device).losses([z.double() for z in outputs], target)
    assert not (losses.isfinite() & ~exact.isfinite()).any()
    greatest = max(z.abs().nan_to_num(torch.inf, torch.inf).max() for z in outputs)
    assert losses.isfinite().all() or greatest > 1e8


# What doesn't change the loss: (outputs, target) to the same in another form.
SAME = {
    "tuple and list of targets": lambda outputs, target: (tuple(outputs), [target, None]),
    "outputs of a frozen network": lambda outputs, target: ([z.detach() for z in outputs], target),
    "a target with a gradient": lambda outputs, target: (outputs, target.float().requires_grad_()),
    **{f"target in {d}": lambda outputs, target, d=d: (outputs, target.to(d)) for d in DTYPES_OF_TARGETS},
}


@fuzz
@given(example=examples(greatest_exponent=1), form=st.sampled_from(sorted(SAME)))
def test_the_form_of_the_arguments_does_not_matter(example, form):
    arguments, outputs, target = example
    if "uint" in form and arguments["ignore_label"] == -1 or "int8" in form and arguments["ignore_label"] == 255:
        return  # the dtype doesn't have the ignore label
    loss = LoMixLoss(**arguments)
    torch.testing.assert_close(loss.losses(*SAME[form](outputs, target)), loss.losses(outputs, target))


def with_value(tensor, place, value):
    changed = tensor.clone()
    changed.view(-1)[place % changed.numel()] = value
    return changed


def with_output(outputs, place, change):
    place %= len(outputs)
    return [*outputs[:place], change(outputs[place]), *outputs[place + 1 :]]


# What isn't a batch: (outputs, target, a random number) to something else.
WRONG = {
    "an output too few": lambda z, t, n: (z[1:], t),
    "an output too many": lambda z, t, n: ([*z, z[-1]], t),
    "one tensor": lambda z, t, n: (z[0], t),
    "no list": lambda z, t, n: (dict(enumerate(z)), t),
    "nothing": lambda z, t, n: (None, t),
    "no target": lambda z, t, n: (z, [None, []][n % 2]),
    "arrays": lambda z, t, n: ([x.numpy() for x in z], t),
    "an array as target": lambda z, t, n: (z, [t.numpy(), [t.numpy()]][n % 2]),
    "nothing among the outputs": lambda z, t, n: (with_output(z, n, lambda x: None), t),
    "integers": lambda z, t, n: (with_output(z, n, torch.Tensor.long), t),
    "complex numbers": lambda z, t, n: (with_output(z, n, lambda x: x.to(torch.complex64)), t),
    "eight bits": lambda z, t, n: (with_output(z, n, lambda x: x.to(torch.float8_e4m3fn)), t),
    "sparse": lambda z, t, n: (with_output(z, n, torch.Tensor.to_sparse), t),
    "another device": lambda z, t, n: (with_output(z, n, lambda x: x.to("meta")), t),
    "a target on another device": lambda z, t, n: (z, t.to("meta")),
    "a complex target": lambda z, t, n: (z, t.to(torch.complex64)),
    "another batch": lambda z, t, n: (with_output(z, n, lambda x: torch.cat([x, x])), t),
    "another batch of targets": lambda z, t, n: (z, torch.cat([t, t])),
    "an empty batch": lambda z, t, n: ([x[:0] for x in z], t[:0]),
    "a class more": lambda z, t, n: (with_output(z, n, lambda x: torch.cat([x, x[:, :1]], 1)), t),
    "no channel": lambda z, t, n: (z, t[:, 0]),
    "a channel more": lambda z, t, n: (z, torch.cat([t, t[:, :1]], 1)),
    "an axis more": lambda z, t, n: (with_output(z, n, lambda x: x[..., None]), t),
    "an axis less": lambda z, t, n: (with_output(z, n, lambda x: x[..., 0]), t),
    "an empty output": lambda z, t, n: (with_output(z, n, lambda x: x[..., :0]), t),
    "a larger target": lambda z, t, n: (z, torch.cat([t, t], -1)),
    "a number as target": lambda z, t, n: (z, torch.tensor(0)),
    "a value that is none": lambda z, t, n: (z, with_value(t, n, [10, 200, -7, 2**40][n % 4])),
    "a value between": lambda z, t, n: (z, with_value(t.float(), n, [0.5, np.nan, np.inf, -1e30][n % 4])),
}


@fuzz
@given(example=examples(greatest_exponent=1), wrong=st.sampled_from(sorted(WRONG)), number=st.integers(0, 10**6))
def test_what_is_no_batch_is_refused_by_a_sentence(example, wrong, number):
    arguments, outputs, target = example
    loss = LoMixLoss(**arguments)
    before = {name: t.clone() for name, t in loss.state_dict().items() if torch.is_tensor(t)}
    with pytest.raises(ValueError, match=r"^[a-z].{20}"):
        loss(*WRONG[wrong](outputs, target, number))
    assert all(torch.equal(t, loss.state_dict()[name]) for name, t in before.items())
