"""The study's weighting rules, as tests/loss/test_rules.py has it for those of the package."""

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunet_lomix.loss import RULES, LoMixLoss, SamplingLoMixLoss, WeightingRule

from ...loss.oracle import anchored, effective_weights, example, gradient_of_theta
from ...loss.test_lessons import TARGET, free_logits, nnunets_optimiser
from . import oracle

STUDY_RULES = ["alignment", "alignment_held_out", "fade_in", "fade_out", "inverse", "normalised"]
FADING = ["fade_in", "fade_out"]
LEARNED = ["fade_in", "fade_out", "normalised"]


def remember(rule: WeightingRule, values: Tensor) -> None:
    """Show a rule some values, each kind of rule in its way, half-way through a training."""
    if hasattr(rule, "align"):
        rule.align(values)
    if hasattr(rule, "progress"):
        rule.progress = 0.5
    rule.observe(values)


def randomised(rule: WeightingRule, seed: int = 0) -> WeightingRule:
    """A rule in the middle of a training, with any parameters and any past."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in rule.parameters():
        torch.nn.init.normal_(parameter, std=3, generator=generator)
    rule.double()
    rule.steps = 1  # the parameters are the random ones
    remember(rule, torch.rand(rule.num_maps, generator=generator, dtype=torch.float64))
    return rule


def grad_theta(name: str, theta: np.ndarray, losses: np.ndarray) -> np.ndarray:
    if name == "normalised":
        return oracle.grad_theta_of_normalised(theta, losses)
    return gradient_of_theta("barrier", theta, losses)


def test_all_are_registered(extensions: ModuleType) -> None:
    modules = {RULES[name].__module__ for name in STUDY_RULES}
    assert all(module.startswith("extensions.") for module in modules) and len(modules) == 4


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", STUDY_RULES)
def test_weights_sum_to_one_and_z_0_keeps_its_share(name: str, share: float) -> None:
    for seed in range(5):
        weights = randomised(RULES[name](7, share), seed).weights().detach()
        assert weights.sum().item() == pytest.approx(1)
        assert weights[0] >= share and (weights >= 0).all()
        if share == 1:
            assert weights.tolist() == [1] + [0] * 6
        if share == 0:
            assert (weights[1:] > 0).all()


def test_weights_of_normalised_equal_the_oracle() -> None:
    for rule in (RULES["normalised"](6, 0.4).double(), randomised(RULES["normalised"](6, 0.4))):
        expected = oracle.normalised_weights(rule.theta.detach().numpy(), 0.4)
        np.testing.assert_allclose(rule.weights().detach(), expected)


@pytest.mark.parametrize("name", [name for name in STUDY_RULES if name not in FADING])
def test_weights_start_equal(name: str) -> None:
    start = RULES[name](6, 0.0).weights()
    assert (start == start[0]).all()


def test_inverse_equals_the_oracle_on_the_mean_of_the_losses_so_far() -> None:
    rule = RULES["inverse"](5, 0.4).double()
    mean = None
    for step in range(4):
        losses = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) + 0.1
        mean = losses.numpy() if mean is None else 0.99 * mean + 0.01 * losses.numpy()
        rule.observe(losses)
        expected = anchored(oracle.inverse_losses(mean), 0.4)
        np.testing.assert_allclose(rule.weights().numpy(), expected, rtol=1e-12)


def test_alignment_counts_a_map_by_its_help_relative_to_z_0() -> None:
    rule = RULES["alignment"](5, 0.5)
    rule.align(torch.tensor([2.0, 1.0, -3.0, 0.0, 8.0]))
    torch.testing.assert_close(rule.raw(), torch.tensor([1, 0.5, 0, 0, 1]))
    rule.steps = 1
    rule.align(torch.tensor([2.0, 2.0, -3.0, 0.0, 8.0]))  # a tenth of the way to it
    torch.testing.assert_close(rule.raw(), torch.tensor([1, 0.55, 0, 0, 1]))


@pytest.mark.parametrize("alignment", [[0.0, 0.0, 0.0], [-1.0, 1.0, -1.0], [1e-38, 1e38, 0.0]])
def test_alignment_without_a_sensible_measurement_still_gives_weights(alignment: list[float]) -> None:
    rule = RULES["alignment"](3, 0.5)
    rule.align(torch.tensor(alignment))
    assert rule.weights().isfinite().all() and rule.weights().sum().item() == pytest.approx(1)


def test_fading_goes_from_one_end_to_the_other() -> None:
    out, into = (randomised(RULES[name](4, 0.3)) for name in ("fade_out", "fade_in"))
    alone = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    barrier = torch.from_numpy(effective_weights("barrier", out.theta.detach().numpy(), 0.3))
    for t in (0, 0.25, 1):
        out.progress = into.progress = t
        torch.testing.assert_close(out.weights().detach(), (1 - t) * barrier + t * alone)
        torch.testing.assert_close(into.weights().detach(), t * barrier + (1 - t) * alone)


@pytest.mark.parametrize("name", LEARNED)
def test_gradient_of_the_objective_equals_the_oracle(name: str) -> None:
    rule = randomised(RULES[name](6, 0.0))
    losses = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rule.objective(losses).backward()
    expected = grad_theta(name, rule.theta.detach().numpy(), losses.numpy())
    np.testing.assert_allclose(rule.theta.grad, expected, rtol=1e-9)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", STUDY_RULES)
def test_share_out_of_range(name: str, share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        RULES[name](3, share)


@pytest.mark.parametrize("name", STUDY_RULES)
def test_in_the_loss_network_and_rule_have_separate_gradients(name: str) -> None:
    """The network sees the weights as constants, the rule sees the losses as constants and non-negative."""
    loss = LoMixLoss(3, 3, rule=name, share=0.4).double()
    randomised(loss.rule)
    outputs, target = example([(8, 6), (4, 3), (2, 2)])
    outputs, target = [torch.from_numpy(z).requires_grad_() for z in outputs], torch.from_numpy(target)
    seen, objective = [], loss.rule.objective
    loss.rule.objective = lambda losses: seen.append(losses) or objective(losses)

    losses = loss.losses(outputs, target)
    loss.rule.observe(losses.detach() + 1)
    loss.rule.momentum = 1  # so that it sees the same when it observes the losses again
    weights = loss.weights()
    assert not weights.requires_grad
    expected = torch.autograd.grad((weights * losses).sum(), outputs)
    total = loss(outputs, target)
    total.backward()

    assert total.item() == pytest.approx((weights * losses).sum().item())
    torch.testing.assert_close([z.grad for z in outputs], list(expected))
    assert not seen[0].requires_grad and (seen[0] >= 0).all()
    torch.testing.assert_close(seen[0], losses.detach() + 1)
    for parameter in loss.rule.parameters():
        expected_grad = grad_theta(name, parameter.detach().numpy(), seen[0].numpy())
        np.testing.assert_allclose(parameter.grad, expected_grad, rtol=1e-9)


@pytest.mark.parametrize("name", STUDY_RULES)
def test_a_step_that_went_wrong_leaves_finite_weights(name: str) -> None:
    """Under mixed precision some steps overflow; nnU-Net's gradient scaler skips them."""
    right = torch.tensor([1.1, 0.2, 0.2, 0.6])
    wrong = torch.tensor([1.0, float("nan"), float("inf"), 0.5])
    for losses in ([wrong, right], [right, wrong]):
        rule = RULES[name](4, 0.0)
        for values in losses:
            remember(rule, values)
        assert rule.weights().isfinite().all()


@pytest.mark.parametrize("name", STUDY_RULES)
def test_weights_stay_bounded_where_the_naive_ones_explode(name: str) -> None:
    loss = LoMixLoss(2, 3, rule=name, share=0.5, backend="plain")
    outputs, seen, objective = free_logits(coarse=9, z_0=9), [], loss.rule.objective
    loss.rule.objective = lambda losses: seen.append(losses) or objective(losses)
    optimiser = nnunets_optimiser(loss.rule.parameters()) if list(loss.rule.parameters()) else None
    sums = [loss.weights().sum().item()]
    for _ in range(50):
        total = loss(outputs, TARGET)
        total.backward()
        if optimiser:
            optimiser.step()
            optimiser.zero_grad()
        sums.append(loss.weights().sum().item())
        assert total.isfinite()
    assert (torch.stack(seen) >= 0).all()
    assert sums == pytest.approx([1] * len(sums))
    assert loss.weights()[0] >= 0.5


def test_mutants_that_fade_in_are_not_drawn_at_the_start() -> None:
    outputs, target = example([(8, 6), (4, 3), (2, 2)])
    target = torch.from_numpy(target)
    sampling = SamplingLoMixLoss(3, 3, rule="fade_in", share=0.5, sampled_mutants=4).double()
    for _ in range(3):
        z = [torch.from_numpy(output).requires_grad_() for output in outputs]
        value = sampling(z, target)
        assert value.item() == pytest.approx(sampling.losses(z, target)[0].item())
        value.backward()
        assert all(output.grad is not None for output in z)  # DDP waits for gradients of all heads


def test_two_samples_of_mutants_before_one_backward_pass() -> None:
    outputs, target = example([(8, 6), (4, 3), (2, 2)])
    z, target = [torch.from_numpy(output).requires_grad_() for output in outputs], torch.from_numpy(target)
    sampling = SamplingLoMixLoss(3, 3, rule="normalised", sampled_mutants=4).double()
    sampling(z, target)
    (sampling(z, target) + sampling(z, target)).backward()
    assert sampling.rule.theta.grad.isfinite().all()
