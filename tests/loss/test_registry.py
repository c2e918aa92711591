"""A new operator or rule is one registration, and LoMixLoss takes it by its name."""

import pytest
import torch
from torch import nn

from nnunet_lomix import LoMixLoss
from nnunet_lomix.loss import OPERATORS, RULES, Operator, WeightingRule
from nnunet_lomix.loss.registry import Registry

OUTPUTS = [torch.linspace(-1, 1, 2 * 2 * n * n).view(2, 2, n, n) for n in (8, 4)]
TARGET = (OUTPUTS[0][:, :1] > 0).long()


@pytest.fixture
def register():
    """Registers for one test."""
    added = []

    def register(registry, name, part):
        registry.register(name)(part)
        added.append((registry, name))

    yield register
    for registry, name in added:
        del registry[name]


def test_registry_gives_back_what_was_registered():
    registry = Registry("thing")
    register = registry.register("a")

    def thing():
        return None

    assert register(thing) is registry["a"] is thing
    with pytest.raises(ValueError, match="thing 'b'; choose from: a"):
        registry["b"]
    with pytest.raises(ValueError, match="thing 'a' is registered already"):
        register(nn.Identity)


@pytest.mark.parametrize("registry", [OPERATORS, RULES])
def test_names_of_the_engine_cannot_be_overwritten(registry):
    for name in registry:
        with pytest.raises(ValueError, match=name):
            registry.register(name)(nn.Identity)


def test_new_operator(register):
    class Negative(Operator):
        def __init__(self, num_classes, subsets):
            super().__init__(num_classes, subsets)
            self.factor = nn.Parameter(torch.tensor(-1.0))

        def mix(self, scales, number):
            return self.factor * sum(scales)

    register(OPERATORS, "negative", Negative)
    loss = LoMixLoss(2, 2, operators=["negative", "add"])
    flipped = LoMixLoss(2, 2, operators=["add"]).losses([-z for z in OUTPUTS], TARGET)[-1]
    losses = loss.losses(OUTPUTS, TARGET)
    assert [m.name for m in loss.maps] == ["z_0", "z_1", "negative_0_1", "add_0_1"]
    torch.testing.assert_close(losses[2], flipped)
    loss(OUTPUTS, TARGET).backward()
    assert loss.operators["negative"].factor.grad != 0


def test_new_rule(register):
    class OnlyTheFirstTwo(WeightingRule):
        def raw(self):
            return torch.tensor([1.0] * 2 + [0.0] * (self.num_maps - 2))

    register(RULES, "first_two", OnlyTheFirstTwo)
    loss = LoMixLoss(2, 2, rule="first_two", share=0.5)
    assert loss.weights().tolist() == [0.5, 0.5] + [0] * 4
    losses = loss.losses(OUTPUTS, TARGET)
    torch.testing.assert_close(loss(OUTPUTS, TARGET), 0.75 * losses[0] + 0.25 * losses[1])
