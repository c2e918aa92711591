"""Banks: all maps of an operator at once are what autograd makes of its forward pass, map by map."""

from itertools import chain, combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_lomix.loss.backends import lean
from nnunet_lomix.loss.backends.banks import BANKS, OneByOne
from nnunet_lomix.loss.backends.base import BoundMap
from nnunet_lomix.loss.backends.lean import LeanEvaluator
from nnunet_lomix.loss.criterion import ClassCriterion
from nnunet_lomix.loss.operators import OPERATORS, Add, Concat, Original

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@st.composite
def stacks(draw):
    """Number of scales, and some of their subsets in any order, also twice; not all, as where mutants are sampled."""
    scales = draw(st.integers(2, 5))
    subsets = [c for size in range(2, scales + 1) for c in combinations(range(scales), size)]
    return scales, draw(st.lists(st.sampled_from(subsets), min_size=1, max_size=8))


def make(operator, subsets, classes):
    operators = [operator(classes, len(subset)).double() for subset in subsets]
    for p in (p for each in operators for p in each.parameters()):
        torch.nn.init.normal_(p)
    return operators


def assert_equals_autograd(kind, operators, subsets, z):
    bank = kind(operators, [list(subset) for subset in subsets], z[0], len(z))
    logits, kept = bank.forward(z)
    leaf = z.clone().requires_grad_()
    expected = torch.stack([each([leaf[None, p] for p in c])[0] for each, c in zip(operators, subsets, strict=True)])
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-9, atol=1e-9)

    grad_logits, before = torch.randn_like(logits), torch.randn_like(z)
    parameters = [p for each in operators for p in each.parameters()]
    grad_z, *grad_parameters = torch.autograd.grad(expected, [leaf, *parameters], grad_logits)
    added = before.clone()
    unpacked = bank.unpack(bank.backward(z, kept, grad_logits, added))
    torch.testing.assert_close(added, before + grad_z, rtol=1e-9, atol=1e-9)
    assert [len(of_map) for of_map in unpacked] == [len(list(each.parameters())) for each in operators]
    for ours, theirs in zip(sum(unpacked, []), grad_parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=25, deadline=None)
@given(stacks(), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
def test_a_bank_is_its_operator(name, stack, classes, pixels, seed):
    torch.manual_seed(seed)
    scales, subsets = stack
    operators = make(OPERATORS[name], subsets, classes)
    z = torch.randn(scales, classes, pixels, dtype=torch.float64)
    for kind in {BANKS.get(type(operators[0]), OneByOne), OneByOne}:
        assert_equals_autograd(kind, operators, subsets, z)


def test_originals_in_any_order():
    z = torch.randn(4, 3, 5, dtype=torch.float64)
    assert_equals_autograd(BANKS[Original], [Original(), Original()], [(2,), (0,)], z)


def test_an_operator_with_a_frozen_parameter():
    class Frozen(Concat):
        def __init__(self, *args):
            super().__init__(*args)
            self.weight.requires_grad_(False)

    z = torch.randn(2, 3, 5, dtype=torch.float64)
    operator = Frozen(3, 2).double()
    bank, grad_z, grad_logits = OneByOne([operator], [[0, 1]], z[0], 2), torch.zeros_like(z), torch.randn_like(z[:1])
    _, kept = bank.forward(z)
    ((grad_weight, grad_bias),) = bank.unpack(bank.backward(z, kept, grad_logits.clone(), grad_z))
    assert grad_weight.shape == operator.weight.shape
    torch.testing.assert_close(grad_bias, grad_logits[0].sum(1, keepdim=True))
    torch.testing.assert_close(grad_z, (grad_logits[0] / 2).expand_as(z))  # concat starts as the mean


def test_a_subclass_of_an_operator_is_not_computed_as_its_base():
    class Halved(Add):
        def forward(self, scales):
            return super().forward(scales) / 2

    criterion = ClassCriterion()
    part = criterion.part(criterion.prepare(torch.tensor([[[0, 2, 1]]]), 3, torch.float64))
    scales = {j: torch.randn(1, 3, 3, dtype=torch.float64) for j in range(2)}
    ours = LeanEvaluator([BoundMap(Halved(3, 2), (0, 1))], criterion, scales[0]).forward(scales, part)
    theirs = criterion.pixel_sums((scales[0] + scales[1]) / 2, part)
    torch.testing.assert_close(ours.cross_entropy[0], theirs.cross_entropy)
    torch.testing.assert_close(ours.volume[0], theirs.volume)


@pytest.mark.parametrize("values", [10, 1000, 5295 * 6])
def test_pieces_are_all_pixels_and_begin_where_vectors_can(values, monkeypatch):
    monkeypatch.setattr(lean, "VALUES", {"cpu": values})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    maps = [BoundMap(Original(), (0,)), BoundMap(Original(), (1,))]
    evaluator = LeanEvaluator(maps, ClassCriterion(), torch.empty(1, 3, 1))
    pieces = [range(9000)[pixels] for _, pixels in evaluator._pieces(torch.empty(1, 2, 3, 9000))]
    assert [*chain(*pieces)] == [*range(9000)]
    assert len(pieces[0]) <= values / 6 and (len(pieces[0]) < 16 or len(pieces[0]) % 16 == 0)
