"""Weighting rules: bounded, anchored at z_0, learned from non-negative losses."""

import math

import numpy as np
import pytest
import torch

from nnunet_lomix import LoMixLoss
from nnunet_lomix.loss.rules import RULES

from . import oracle

NORMALISED = sorted(set(RULES) - {"softplus"})
LEARNED = [name for name in RULES if list(RULES[name](2).parameters())]


def trained(rule, losses, steps=400, lr=0.1):
    optimiser = torch.optim.Adam(rule.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        rule.objective(losses).backward()
        optimiser.step()
    return rule.weights().detach()


def randomised(rule, seed=0):
    """A rule in the middle of a training, with any parameters and any past."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in rule.parameters():
        torch.nn.init.normal_(parameter, std=3, generator=generator)
    rule.double()
    losses = torch.rand(rule.num_maps, generator=generator, dtype=torch.float64)
    rule.steps.fill_(1)  # the parameters are the random ones
    rule.observe(losses)
    return rule


@pytest.mark.parametrize("name", NORMALISED)
def test_weights_are_positive_and_sum_to_one(name):
    for seed in range(5):
        weights = randomised(RULES[name](7), seed).weights().detach()
        assert weights.sum().item() == pytest.approx(1) and (weights > 0).all()


@pytest.mark.parametrize("name", RULES)
def test_weights_equal_the_oracle(name):
    for rule in (RULES[name](6).double(), randomised(RULES[name](6))):
        theta = getattr(rule, "theta", torch.zeros(6)).detach().numpy()
        expected = torch.from_numpy(oracle.weights_of_maps(name, theta))
        torch.testing.assert_close(rule.weights().detach(), expected.to(rule.weights().dtype))


@pytest.mark.parametrize("name", RULES)
def test_weights_start_equal(name):
    start = RULES[name](6).weights()
    assert (start == start[0]).all()


@pytest.mark.parametrize("name", LEARNED)
def test_gradient_of_the_objective_equals_the_oracle(name):
    rule = randomised(RULES[name](6))
    losses = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rule.objective(losses).backward()
    expected = oracle.gradient_of_theta(name, rule.theta.detach().numpy(), losses.numpy())
    np.testing.assert_allclose(rule.theta.grad, expected, rtol=1e-9)


def test_equal_learns_nothing():
    rule = RULES["equal"](4)
    assert not list(rule.parameters()) and rule.objective(torch.ones(4)) is None


def test_softplus_starts_at_ln_2_with_the_papers_gradient():
    rule = RULES["softplus"](3)
    losses = torch.tensor([0.0, 0.5, 2.0])
    rule.objective(losses).backward()
    torch.testing.assert_close(rule.weights().detach(), torch.full((3,), math.log(2)))
    torch.testing.assert_close(rule.theta.grad, 0.5 * losses)  # sigmoid(0) = 1/2


LOSSES = torch.tensor([1.1, 0.2, 0.2, 0.6, 1.7])


def test_barrier_converges_to_weights_in_inverse_proportion_to_the_losses():
    rule = RULES["barrier"](5)
    weights = trained(rule, LOSSES)
    torch.testing.assert_close(rule.raw().detach(), 0.5 / LOSSES, rtol=1e-3, atol=0)
    torch.testing.assert_close(weights, (1 / LOSSES) / (1 / LOSSES).sum(), rtol=1e-3, atol=0)
    assert weights[1] == weights[2]  # equal losses, equal weights


def test_barrier_is_blind_to_a_factor_common_to_all_losses():
    weights, scaled = (trained(RULES["barrier"](5), losses) for losses in (LOSSES, 10 * LOSSES))
    torch.testing.assert_close(scaled, weights, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_in_the_loss_network_and_rule_have_separate_gradients(name):
    """The network sees the weights as constants, the rule sees the losses as constants and non-negative."""
    share = 0.0 if name == "softplus" else 0.4
    loss = LoMixLoss(3, 3, rule=name, share=share).double()
    randomised(loss.rule)
    outputs, target = oracle.example([(8, 6), (4, 3), (2, 2)])
    outputs, target = [torch.from_numpy(z).requires_grad_() for z in outputs], torch.from_numpy(target)
    seen, objective = [], loss.rule.objective
    loss.rule.objective = lambda losses: seen.append(losses) or objective(losses)

    losses = loss.losses(outputs, target)
    loss.rule.observe(losses.detach() + 1)
    weights = loss.weights()
    assert not weights.requires_grad
    value = share * losses[0] + (1 - share) * (weights * losses).sum()
    expected = torch.autograd.grad(value, outputs)
    total = loss(outputs, target)
    total.backward()

    assert total.item() == pytest.approx(value.item())
    torch.testing.assert_close([z.grad for z in outputs], list(expected))
    assert not seen[0].requires_grad and (seen[0] >= 0).all()
    torch.testing.assert_close(seen[0], losses.detach() + 1)
    for parameter in loss.rule.parameters():
        theta_gradient = oracle.gradient_of_theta(name, parameter.detach().numpy(), seen[0].numpy())
        np.testing.assert_allclose(parameter.grad, theta_gradient, rtol=1e-9)


def test_barrier_begins_at_its_optimum_once():
    loss = LoMixLoss(3, 3)
    outputs, target = oracle.example([(8, 6), (4, 3), (2, 2)])
    outputs, target = [torch.from_numpy(z).float() for z in outputs], torch.from_numpy(target)
    with torch.no_grad():
        loss(outputs, target)
    assert loss.rule.steps.item() == 0 and (loss.rule.theta == 0).all()  # a validation step does not count

    loss(outputs, target)
    theta = loss.rule.theta.detach().clone()
    torch.testing.assert_close(loss.rule.raw(), 0.5 / (loss.losses(outputs, target) + 1))
    loss([2 * z for z in outputs], target)
    assert torch.equal(theta, loss.rule.theta)

    # an average of states, too, where the number of steps may have been rounded down
    for steps in (2, 0):
        resumed = LoMixLoss(3, 3)
        resumed.load_state_dict(loss.state_dict() | {"rule.steps": torch.tensor(steps)})
        resumed([2 * z for z in outputs], target)
        assert torch.equal(theta, resumed.rule.theta)


def test_barrier_begins_with_finite_weights_on_any_losses():
    rule = RULES["barrier"](4)
    rule.observe(torch.tensor([0.0, 1e-9, 1.0, 1e30]))
    assert rule.theta.isfinite().all() and rule.weights().sum().item() == pytest.approx(1)
    assert rule.objective(torch.tensor([0.0, 1e-9, 1.0, 1e3])).isfinite()


@pytest.mark.parametrize("name", RULES)
def test_a_step_that_went_wrong_leaves_finite_weights(name):
    """Under mixed precision some steps overflow; nnU-Net's gradient scaler skips them."""
    wrong = torch.tensor([1.0, float("nan"), float("inf"), 0.5])
    for losses in ([wrong, LOSSES[:4]], [LOSSES[:4], wrong]):
        rule = RULES[name](4)
        for values in losses:
            rule.observe(values)
        assert rule.weights().isfinite().all()
