"""LoMix with MONAI's BasicUNetPlusPlus, whose four outputs all have full resolution."""

import torch
from monai.networks.nets import BasicUNetPlusPlus
from shapes import NUM_CLASSES, dice, make_batches, print_result
from torch import Tensor

from nnunet_lomix import LoMixLoss


def make_network() -> BasicUNetPlusPlus:
    """A small UNet++; its outputs come from decoders of one, two, three and four levels, in this order."""
    return BasicUNetPlusPlus(
        spatial_dims=2,
        in_channels=1,
        out_channels=NUM_CLASSES,
        features=(8, 8, 16, 32, 64, 8),
        deep_supervision=True,
    )


def train(network: BasicUNetPlusPlus, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """A step for each batch; returns their losses."""
    loss = LoMixLoss(num_classes=3, num_scales=4)
    rule = {"params": loss.rule.parameters(), "lr": 1e-2, "weight_decay": 0}
    operators = {"params": loss.operators.parameters(), "lr": 1e-3, "weight_decay": 0}
    optimizer = torch.optim.AdamW([{"params": network.parameters()}, rule, operators], lr=5e-3)
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        value = loss(network(images)[::-1], labels)  # LoMix's first output is the one that predicts, here the last
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@torch.no_grad()
def predict(network: BasicUNetPlusPlus, images: Tensor) -> Tensor:
    """Logits of the deepest decoder, the one that the network gives alone without deep supervision."""
    return network(images)[-1]


def run(steps: int = 40) -> tuple[list[float], float, float]:
    """Losses of the steps, and Dice on unseen images before and after the training."""
    torch.manual_seed(0)
    network = make_network()
    [(images, labels)] = make_batches(1, seed=1)
    before = dice(predict(network, images), labels)
    losses = train(network, make_batches(steps, seed=0))
    return losses, before, dice(predict(network, images), labels)


if __name__ == "__main__":
    print_result(*run())
