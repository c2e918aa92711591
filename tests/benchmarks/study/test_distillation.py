"""The best map as a teacher of z_0."""

from types import ModuleType

import numpy as np
import pytest
import torch

from ...loss.oracle import example, map_logits, resample
from . import oracle

SIZES = [(6, 5), (3, 3), (2, 2)]


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_adds_the_divergence_of_z_0_from_the_best_map(extensions: ModuleType, regions: bool, ignore: bool) -> None:
    outputs, target = example(SIZES, regions=regions, ignore=ignore)
    outputs[0] *= 3  # so that another map is better
    label = (True if regions else 3) if ignore else None
    loss = extensions.DistillingLoMixLoss(
        3, 3, ("add",), regions=regions, ignore_label=label, distillation=0.7
    ).double()
    z = [torch.from_numpy(o).requires_grad_() for o in outputs]
    truth = torch.from_numpy(target)
    losses = loss.losses(z, truth)
    loss.rule.observe(losses.detach() + 1)
    best = loss.maps[int(losses.argmin())]
    teacher = map_logits(best.operator, [resample(outputs[j], SIZES[0]) for j in best.scales], {})
    valid = np.ones((2, *SIZES[0]), bool)
    if ignore:
        valid = target[:, -1] == 0 if regions else target[:, 0] != 3
    expected = (oracle.kl_of_regions if regions else oracle.kl_of_classes)(teacher, outputs[0], valid)
    assert expected > 0
    total = loss(z, truth)
    assert total.item() == pytest.approx((loss.weights() * losses).sum().item() + 0.7 * expected)
    # the teacher isn't taught
    gradients = torch.autograd.grad(loss.divergence(z, truth, best), z, allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1] is None and gradients[2] is None


def test_nothing_to_learn_where_z_0_is_the_best_or_no_pixel_is_valid(extensions: ModuleType) -> None:
    outputs, target = example(SIZES)
    z, truth = [torch.from_numpy(o) for o in outputs], torch.from_numpy(target)
    loss = extensions.DistillingLoMixLoss(3, 3, ignore_label=3, distillation=1.0).double()
    assert loss.divergence(z, truth, loss.maps[0]) == 0
    assert loss.divergence(z, torch.full_like(truth, 3), loss.maps[5]) == 0
