"""Maps that leave the finest head little gradient starve it under nnU-Net's SGD, but not under the paper's AdamW.

The head of the finest output, ``z_0``, is the only one that inference uses. AdamW rescales a small gradient.
"""

import pytest
import torch
from torch.nn import functional as F

from nnunet_lomix import LoMixLoss

from ..loss.test_lessons import nnunets_deep_supervision, nnunets_optimiser

WITHOUT_PRODUCTS = ("add", "concat", "fusion")  # products multiply the gradient of z_0 by the other logits
ALL = ("add", "multiply", "concat", "fusion")


def adamw(parameters):
    return torch.optim.AdamW(parameters, 1e-4, weight_decay=1e-4)


def updates(loss, optimiser):
    """How far each step moves a finest head that is worse than the other outputs.

    As where these are trained already: sums with a bad z_0 are good, and ask little of it.
    """
    generator = torch.Generator().manual_seed(0)
    head = (0.1 * torch.randn(9, 9, 1, 1, generator=generator)).requires_grad_()
    optimiser, sizes = optimiser([head]), []
    for _ in range(10):
        squares = torch.randint(9, (2, 1, 4, 4), generator=generator).float()
        target = F.interpolate(squares, scale_factor=8)
        truth = F.one_hot(target[:, 0].long(), 9).movedim(-1, 1).float() * 2 - 1
        known = torch.cat([truth[:, :4], torch.zeros_like(truth[:, 4:])], 1)
        features = known + torch.randn(truth.shape, generator=generator)
        outputs = [F.conv2d(features, head), *(3 * F.avg_pool2d(truth, 2**j) for j in range(1, 5))]
        before = head.detach().clone()
        optimiser.zero_grad()
        loss(outputs, [target[..., :: 2**j, :: 2**j] for j in range(5)]).backward()
        optimiser.step()
        sizes.append((head.detach() - before).norm())
    return torch.stack(sizes)


@pytest.mark.parametrize(
    ("optimiser", "operators", "least", "most"),
    [(nnunets_optimiser, WITHOUT_PRODUCTS, 0, 0.35), (adamw, WITHOUT_PRODUCTS, 0.8, 1.25), (adamw, ALL, 0.8, 1.25)],
)
def test_a_finest_head_that_is_worse_than_the_others(optimiser, operators, least, most):
    equal_weights = LoMixLoss(9, 5, operators, rule="equal", share=0.0)  # z_0 has one among 38 or 49
    ratio = updates(equal_weights, optimiser) / updates(nnunets_deep_supervision(5), optimiser)
    assert least < ratio.mean() < most
