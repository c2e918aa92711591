"""LoMix in a Lightning module, with MONAI's DynUNet."""

from typing import Any

import lightning
import torch
from dynunet import make_network, predict
from shapes import dice, make_batches, print_result
from torch import Tensor
from torch.utils.data import DataLoader

from nnunet_lomix import LoMixLoss


class LoMixModule(lightning.LightningModule):
    """A deeply supervised network, and its loss, which is moved to devices and saved with it."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network
        self.loss = LoMixLoss(num_classes=3, num_scales=3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        value = self.loss(self.network(images), labels)
        self.log("loss", value)
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        rule = {"params": self.loss.rule.parameters(), "lr": 1e-2, "weight_decay": 0}
        operators = {"params": self.loss.operators.parameters(), "lr": 1e-3, "weight_decay": 0}
        return torch.optim.AdamW([{"params": self.network.parameters()}, rule, operators], lr=5e-3)


class Losses(lightning.Callback):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics["loss"]))


def run(steps: int = 60) -> tuple[list[float], float, float]:
    """Losses of the steps, and Dice on unseen images before and after the training."""
    torch.manual_seed(0)
    module = LoMixModule(make_network())
    [(images, labels)] = make_batches(1, seed=1)
    before = dice(predict(module.network, images), labels)
    losses = Losses()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(make_batches(steps, seed=0), batch_size=None))  # they are batches already
    return losses.values, before, dice(predict(module.network, images), labels)


if __name__ == "__main__":
    print_result(*run())
