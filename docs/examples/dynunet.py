"""LoMix with MONAI's DynUNet, which gives its outputs as one stacked tensor."""

import torch
from monai.networks.nets import DynUNet
from shapes import NUM_CLASSES, dice, make_batches, print_result
from torch import Tensor

from nnunet_lomix import LoMixLoss


def make_network() -> DynUNet:
    """A small U-Net with outputs at full, half and a quarter of the resolution."""
    return DynUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=NUM_CLASSES,
        kernel_size=[3, 3, 3, 3],
        strides=[1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2],
        filters=[8, 16, 32, 64],
        deep_supervision=True,
        deep_supr_num=2,
    )


def train(network: DynUNet, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """A step for each batch; returns their losses."""
    loss = LoMixLoss(num_classes=3, num_scales=3)  # z_0 and the two heads of the deep supervision
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    groups = [{"params": loss.rule.parameters(), "lr": 1e-2}, {"params": loss.operators.parameters(), "lr": 1e-3}]
    loss_optimizer = torch.optim.AdamW(groups, weight_decay=0)
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss_optimizer.zero_grad()
        value = loss(network(images), labels)  # DynUNet stacks its outputs, (B, 3, 3, 64, 64); a list does as well
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
        loss_optimizer.step()
        losses.append(value.item())
    return losses


@torch.no_grad()
def predict(network: DynUNet, images: Tensor) -> Tensor:
    """Logits of the finest output, the only one that DynUNet gives in evaluation."""
    network.eval()
    logits = network(images)
    network.train()
    return logits


def run(steps: int = 60) -> tuple[list[float], float, float]:
    """Losses of the steps, and Dice on unseen images before and after the training."""
    torch.manual_seed(0)
    network = make_network()
    [(images, labels)] = make_batches(1, seed=1)
    before = dice(predict(network, images), labels)
    losses = train(network, make_batches(steps, seed=0))
    return losses, before, dice(predict(network, images), labels)


if __name__ == "__main__":
    print_result(*run())
