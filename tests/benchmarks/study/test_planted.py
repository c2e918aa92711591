"""Planted structure: a rule is useful if it finds out which maps are noise and which help."""

import pytest
import torch
from torch import Tensor

from nnunet_lomix.loss import RULES

USEFUL = ["barrier"]  # a new rule is named here, too
Z_0, NOISE, HELPFUL, TWIN, OTHER_TWIN = range(5)
DEAR_NOISE, CHEAP_NOISE = (0.3, 3.0, 0.05, 1.5, 1.5), (0.3, 0.05, 3.0, 1.5, 1.5)


def train(
    name: str,
    scale: float = 1.0,
    order: list[int] | None = None,
    steps: int = 400,
    costs: tuple[float, ...] = DEAR_NOISE,
) -> Tensor:
    """Effective weights after a training by noisy gradients, with the maps in the given order.

    Map i has the loss ``scale · (ρ_i |φ + ξ|² / 2 + costs_i)``, with a new ξ at every step, and its gradient.
    z_0 and the helpful map have ρ = 1, the twins have half of the gradient. That of the noise points anywhere.
    """
    order = list(range(5)) if order is None else order
    generator = torch.Generator().manual_seed(0)
    rho, b = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.5]), torch.tensor(costs)
    phi = 0.5 * torch.randn(8, generator=generator)
    rule = RULES[name](5)
    optimiser = torch.optim.Adam(rule.parameters(), 1e-2) if list(rule.parameters()) else None
    for _ in range(steps):
        x = phi + 0.3 * torch.randn(8, generator=generator)
        losses, gradients = rho * x.square().sum() / 2 + b, rho[:, None] * x
        gradients[NOISE] = torch.randn(8, generator=generator)
        losses, gradients = scale * losses[order], scale * gradients[order]
        rule.observe(losses)
        phi = phi - 1e-2 / scale * rule.weights().detach() @ gradients
        if optimiser:
            optimiser.zero_grad()
            rule.objective(losses).backward()
            optimiser.step()
    weights = torch.empty(5)
    weights[order] = rule.weights().detach()
    return weights


@pytest.mark.parametrize("name", USEFUL)
def test_noise_loses_weight(name: str) -> None:
    weights = train(name)
    assert weights[NOISE] < 0.5 * weights.sum() / 5


@pytest.mark.parametrize("name", USEFUL)
def test_a_map_that_helps_gains_weight(name: str) -> None:
    weights = train(name)
    assert weights[HELPFUL] == weights[1:].max() and weights[HELPFUL] > 2 * weights[NOISE]


@pytest.mark.parametrize("name", USEFUL)
def test_rules_that_look_at_losses_alone_fall_for_cheap_noise(name: str) -> None:
    weights = train(name, costs=CHEAP_NOISE)
    assert weights[NOISE] > weights[HELPFUL]  # their limit, as their docstrings and docs/method.md say


@pytest.mark.parametrize("name", RULES)
def test_equal_maps_get_equal_weights(name: str) -> None:
    weights = train(name)
    assert weights[TWIN].item() == pytest.approx(weights[OTHER_TWIN].item())


@pytest.mark.parametrize("name", [*USEFUL, "equal"])
def test_a_factor_common_to_all_losses_changes_nothing(name: str) -> None:
    torch.testing.assert_close(train(name, scale=10.0), train(name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_the_maps_changes_nothing(name: str) -> None:
    torch.testing.assert_close(train(name, order=[0, 3, 1, 4, 2]), train(name), rtol=1e-4, atol=1e-6)


def test_rules_that_learn_nothing_or_only_fade_fail() -> None:
    assert (train("equal") == 0.2).all()
    softplus, long = train("softplus"), train("softplus", steps=4000)
    assert softplus.sum() < 5 * 0.6931 and long.max() < 0.1  # all fade, the helpful map too
