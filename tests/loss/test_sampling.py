"""A sample of the mutants at each step, unbiased."""

import pytest
import torch

from nnunet_lomix import LoMixLoss
from nnunet_lomix.loss import SamplingLoMixLoss

from . import oracle

OUTPUTS, TARGET = oracle.example([(8, 6), (4, 3), (2, 2)])
TARGET = torch.from_numpy(TARGET)


def outputs():
    return [torch.from_numpy(z).requires_grad_() for z in OUTPUTS]


def both(**kwargs):
    """The loss with a sample and the loss of all maps, both with the same rule after the first step."""
    sampling, full = SamplingLoMixLoss(3, 3, **kwargs).double(), LoMixLoss(3, 3).double()
    sampling(outputs(), TARGET), full(outputs(), TARGET)
    return sampling, full


@pytest.mark.parametrize("n", [1, 8])
def test_the_expectation_is_the_full_loss_and_its_gradient(n):
    sampling, full = both(sampled_mutants=n)
    z = outputs()
    losses, weights = full.losses(z, TARGET).detach(), full.weights()
    (expected,) = torch.autograd.grad(full(z, TARGET), z[:1])
    draws = 1200 // n
    values, total = [], torch.zeros_like(expected)
    state = sampling.rule.state_dict()
    for step in range(1, draws + 1):
        sampling.rule.load_state_dict(state)
        sampling.rule.steps = step
        value = sampling(z, TARGET)
        values.append(value.item())
        total += torch.autograd.grad(value, z[0])[0] / draws
    values = torch.tensor(values)
    p = weights[3:] / weights[3:].sum()
    variance = weights[3:].sum() ** 2 * (p * (losses[3:] - (p * losses[3:]).sum()) ** 2).sum() / n
    error = 4 * (variance / draws).sqrt()
    assert values.mean().item() == pytest.approx((weights * losses).sum().item(), abs=error.item())
    assert values.var().item() == pytest.approx(variance.item(), rel=0.3)
    assert (total - expected).norm() < 0.2 * expected.norm()


def test_only_the_sample_is_evaluated_and_the_rule_remembers_the_rest():
    sampling, _ = both(sampled_mutants=2)
    evaluated, losses = [], sampling.losses
    sampling.losses = lambda z, t, chosen=None: evaluated.append(chosen) or losses(z, t, chosen)
    seen, observe = [], sampling.rule.observe
    sampling.rule.observe = lambda x: seen.append(x.clone()) or observe(x)
    before = sampling.last_losses.clone()
    other = [2 * z for z in outputs()]
    sampling(other, TARGET).backward()
    (chosen,) = evaluated
    assert chosen[:3].tolist() == [0, 1, 2] and len(chosen) == 5 and (chosen[3:] >= 3).all()
    for i, (old, now, all_now) in enumerate(zip(before, seen[0], losses(other, TARGET) + 1, strict=True)):
        assert now == pytest.approx((all_now if i in chosen.tolist() else old).item())
    assert sampling.rule.theta.grad.count_nonzero() >= 4


def test_the_sample_depends_on_the_step_alone():
    first, second = (both(sampled_mutants=4)[0] for _ in range(2))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draws = [loss.draw(step)[0] for loss in (first, second) for step in (1, 2)]
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3]) and not torch.equal(draws[0], draws[1])
    assert torch.equal(state, torch.get_rng_state())


def test_without_gradient_all_maps_count():
    sampling, full = both(sampled_mutants=1)
    known = sampling.last_losses.clone()
    with torch.no_grad():
        sampling([2 * z for z in outputs()], TARGET)
        assert torch.equal(sampling.last_losses, known)  # validation isn't what the rule learns from
        assert sampling(outputs(), TARGET).item() == pytest.approx(full(outputs(), TARGET).item())


@pytest.mark.parametrize("n", [0, 17])
def test_size_of_the_sample_out_of_range(n):
    with pytest.raises(ValueError, match="between 1 and the 16 mutants"):
        SamplingLoMixLoss(3, 3, sampled_mutants=n)


def test_mutants_without_weight_are_not_drawn():
    sampling = SamplingLoMixLoss(3, 3, share=1.0, sampled_mutants=4).double()
    for _ in range(3):
        z = outputs()
        value = sampling(z, TARGET)
        assert value.item() == pytest.approx(sampling.losses(z, TARGET)[0].item())
        value.backward()
        assert all(output.grad is not None for output in z)  # DDP waits for gradients of all heads


def test_states_of_losses_that_sample_and_of_those_that_do_not_are_exchanged():
    sampling, full = both(sampled_mutants=2)
    other = LoMixLoss(3, 3).double()
    other.load_state_dict(sampling.state_dict())
    again = SamplingLoMixLoss(3, 3, sampled_mutants=2).double()
    again.load_state_dict(full.state_dict())
    seen, losses = [], again.losses
    again.losses = lambda z, t, chosen=None: seen.append(chosen) or losses(z, t, chosen)
    for _ in range(2):
        again(outputs(), TARGET)
    assert seen[0] is None and len(seen[1]) == 5  # all maps once, as nothing is known of them
    resumed = SamplingLoMixLoss(3, 3, sampled_mutants=2).double()
    resumed.load_state_dict(sampling.state_dict())
    assert resumed(outputs(), TARGET) == sampling(outputs(), TARGET)


def test_a_step_that_overflows_is_forgotten():
    sampling, _ = both(sampled_mutants=8)
    sampling([z * float("inf") for z in outputs()], TARGET)
    assert sampling.last_losses.isfinite().all()
    value = sampling(outputs(), TARGET)
    value.backward()
    assert value.isfinite() and sampling.rule.theta.grad.isfinite().all()


def test_two_steps_before_one_backward_pass():
    sampling = SamplingLoMixLoss(3, 3, rule="barrier", sampled_mutants=4).double()
    sampling(outputs(), TARGET)
    (sampling(outputs(), TARGET) + sampling(outputs(), TARGET)).backward()
    assert sampling.rule.theta.grad.isfinite().all()
