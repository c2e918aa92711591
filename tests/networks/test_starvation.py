"""Maps that leave the finest head little gradient starve it under nnU-Net's SGD, but not under the paper's AdamW.

The head of the finest output, ``z_0``, is the only one that inference uses. AdamW rescales a small gradient.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunet_lomix import LoMixLoss
from nnunet_lomix.networks.emcad import EMCADDecoder

from ..loss.test_lessons import nnunets_deep_supervision, nnunets_optimiser

WITHOUT_PRODUCTS = ("add", "concat", "fusion")  # products multiply the gradient of z_0 by the other logits
ALL = ("add", "multiply", "concat", "fusion")


def adamw(parameters):
    return torch.optim.AdamW(parameters, 1e-4, weight_decay=1e-4)


def equal_weights(scales, operators):
    """The paper's maps with fixed equal weights: z_0 has one among 37 to 49."""
    return LoMixLoss(9, scales, operators, rule="equal", share=0.0)


def draw(step):
    """An image of squares, and their brightness in nine classes, in five resolutions."""
    generator = torch.Generator().manual_seed(step)
    squares = torch.rand(2, 1, 4, 4, generator=generator)
    image = F.interpolate(squares, scale_factor=8) + 0.05 * torch.randn(2, 1, 32, 32, generator=generator)
    target = F.interpolate((squares * 9).floor(), scale_factor=8)
    return image, [target[..., :: 2**j, :: 2**j] for j in range(5)]


def updates(forward, head, parameters, loss, optimiser, steps):
    """How far each step moves the finest head."""
    optimiser, sizes = optimiser(parameters), []
    for step in range(steps):
        image, targets = draw(step)
        outputs = forward(image, targets[0])
        before = head.detach().clone()
        optimiser.zero_grad()
        loss(outputs, targets[: len(outputs)]).backward()
        optimiser.step()
        sizes.append((head.detach() - before).norm())
    return torch.stack(sizes)


class Small(nn.Module):
    """EMCAD behind four strided convolutions."""

    def __init__(self):
        super().__init__()
        widths = (16, 16, 32, 32)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, stride in zip((1, *widths), widths, (1, 2, 2, 2), strict=False)
        )
        self.decoder = EMCADDecoder(widths, 9)

    def forward(self, x, _):
        features = []
        for down in self.down:
            features.append(x := down(x))
        return self.decoder(features)


@pytest.mark.parametrize(("optimiser", "least", "most"), [(nnunets_optimiser, 0, 0.6), (adamw, 0.8, 1.25)])
def test_the_finest_head_of_emcad_among_48_maps(optimiser, least, most):
    torch.set_num_threads(1)

    def train(loss):
        torch.manual_seed(0)
        network = Small()
        return updates(network, network.decoder.seg_layers[-1].weight, network.parameters(), loss, optimiser, 20)

    loss = equal_weights(4, ALL)
    assert len(loss.maps) == 48
    ratio = train(loss) / train(nnunets_deep_supervision(4))
    assert least < ratio.mean() < most


@pytest.mark.parametrize(
    ("optimiser", "operators", "maps", "least", "most"),
    [(nnunets_optimiser, WITHOUT_PRODUCTS, 38, 0, 0.35), (adamw, WITHOUT_PRODUCTS, 38, 0.8, 1.25)]
    + [(adamw, ALL, 49, 0.8, 1.25)],
)
def test_a_finest_head_that_is_worse_than_the_others(optimiser, operators, maps, least, most):
    """As where the coarse outputs are trained already: sums with a bad z_0 are good, and ask little of it."""

    def train(loss):
        generator = torch.Generator().manual_seed(0)
        head = (0.1 * torch.randn(9, 9, 1, 1, generator=generator)).requires_grad_()

        def forward(_, target):
            truth = F.one_hot(target[:, 0].long(), 9).movedim(-1, 1).float() * 2 - 1
            known = torch.cat([truth[:, :4], torch.zeros_like(truth[:, 4:])], 1)
            features = known + torch.randn(truth.shape, generator=generator)
            return [F.conv2d(features, head), *(3 * F.avg_pool2d(truth, 2**j) for j in range(1, 5))]

        return updates(forward, head, [head], loss, optimiser, 10)

    loss = equal_weights(5, operators)
    assert len(loss.maps) == maps
    ratio = train(loss) / train(nnunets_deep_supervision(5))
    assert least < ratio.mean() < most
