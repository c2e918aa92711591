"""Two ranks (gloo) outside nnU-Net: plain DDP around a module that holds the loss keeps one set of weights."""

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_lomix import LoMixLoss


class Module(nn.Module):
    """A network and its loss, as in docs/examples/lightning_module.py."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.coarse = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 3, 3, padding=1, stride=2)
        self.loss = LoMixLoss(3, 2)

    def forward(self, image, target):
        return self.loss([self.fine(image), self.coarse(image)], target)


def train(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    module = DistributedDataParallel(Module())
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(rank)  # each rank has batches of its own
    for _ in range(5):
        image = torch.randn(2, 1, 8, 8, generator=generator)
        optimizer.zero_grad()
        module(image, (image > rank - 0.5).long()).backward()
        optimizer.step()
    with torch.no_grad():  # a validation of one rank alone waits for nobody
        if rank == 0:
            module.module(image, (image > 0).long())
    torch.save(module.module.loss.state_dict(), f"{results}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")
def test_ranks_of_plain_ddp_keep_the_same_weights(tmp_path):
    multiprocessing.spawn(train, (tmp_path / "store", tmp_path / "loss"), nprocs=2)
    first, second = (torch.load(tmp_path / f"loss_{rank}.pt") for rank in (0, 1))
    assert first["rule.steps"] == 5 and first["rule.theta"].std() > 0
    torch.testing.assert_close(first, second, rtol=0, atol=0)
