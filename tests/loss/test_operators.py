"""Operators: values by the oracle, the start as the mean, no random numbers."""

import pytest
import torch

from nnunet_lomix.loss.operators import OPERATORS

from . import oracle

LEARNED = ("concat", "fusion")


def scales_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 10, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_equals_the_oracle(name, count):
    scales = scales_of(count)
    subsets = oracle.subsets(count)
    operator = OPERATORS[name](3, subsets).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in operator.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    parameters = {key: value.detach().numpy() for key, value in operator.named_parameters()}
    for number, subset in enumerate(subsets):
        expected = oracle.map_logits(name, [scales[j].numpy() for j in subset], parameters, number, subset)
        got = operator(scales, subset).detach()
        torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", LEARNED)
def test_learned_operators_start_as_the_mean(name, count):
    scales = scales_of(count)
    operator = OPERATORS[name](3, oracle.subsets(count)).double()
    for subset in operator.subsets:
        mean = sum(scales[j] for j in subset) / len(subset)
        torch.testing.assert_close(operator(scales, subset), mean)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_operators_have_gradients_at_the_start(name):
    """All that is used, and nothing else."""
    subsets = [(0, 1, 2), (0, 2)]
    operator = OPERATORS[name](3, subsets).double()
    scales = scales_of(3)
    sum((operator(scales, subset) * scales_of(1, seed=1)[0]).sum() for subset in subsets).backward()
    assert torch.equal(operator.weight.grad != 0, operator.used > 0)
