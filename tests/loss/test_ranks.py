"""Two ranks (gloo) outside nnU-Net, by plain DDP and by Lightning: they keep one set of weights."""

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_lomix import LoMixLoss

STEPS = 5


class Module(nn.Module):
    """A network and its loss, as in docs/examples/lightning_module.py."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.coarse = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 3, 3, padding=1, stride=2)
        self.loss = LoMixLoss(3, 2)

    def forward(self, image, target):
        return self.loss([self.fine(image), self.coarse(image)], target)


def batches(rank):
    """Each rank has batches of its own."""
    generator = torch.Generator().manual_seed(rank)
    images = [torch.randn(2, 1, 8, 8, generator=generator) for _ in range(STEPS)]
    return [(image, (image > rank - 0.5).long()) for image in images]


def plain(rank, module):
    dist.init_process_group("gloo", rank=rank, world_size=2)
    parallel = DistributedDataParallel(module)
    optimizer = torch.optim.Adam(parallel.parameters(), 1e-2)
    for image, target in batches(rank):
        optimizer.zero_grad()
        parallel(image, target).backward()
        optimizer.step()


def lightning(rank, module):
    import lightning

    class LightningModule(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.module = module

        def training_step(self, batch, batch_idx):
            return self.module(*batch)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    os.environ["LOCAL_RANK"] = str(rank)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, use_distributed_sampler=False, **quiet
    )
    trainer.fit(LightningModule(), torch.utils.data.DataLoader(batches(rank), batch_size=None))


def train(rank, way, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    module = Module()
    way(rank, module)
    with torch.no_grad():  # a validation of one rank alone waits for nobody
        if rank == 0:
            module(*batches(0)[0])
    torch.save(module.loss.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")
@pytest.mark.parametrize("way", [plain, lightning])
def test_ranks_keep_the_same_weights(tmp_path, monkeypatch, way):
    if way is lightning:
        pytest.importorskip("lightning")
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # the processes import this module
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(train, (way, port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["rule.steps"] == STEPS and first["rule.theta"].std() > 0
    torch.testing.assert_close(first, second, rtol=0, atol=0)
