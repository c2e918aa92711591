"""DDP with 2 and 4 processes (gloo, on a CPU): they equal one process, and a rank that dies ends the others.

What one process has to equal. Each rank has the loss of its own samples: the cross-entropy is a mean over its valid
pixels, and so is the Dice of a sample over its samples; with ``batch_dice`` the Dice is that of all samples of all
ranks. DDP averages the gradients over ranks, whatever the sizes of their batches. So W ranks train by

    Σ_r CE(samples of r) / W − Dice(all samples)                    with batch_dice,
    Σ_r [CE(samples of r) − mean Dice of the samples of r] / W      without,

which is nnU-Net's own loss on W GPUs (nnU-Net can't gather the Dice of batches of different sizes; we can). Where all
ranks have as many samples, and as many valid pixels, it is the loss of the joint batch.
"""

import functools
import itertools
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_lomix.loss import LoMixLoss
from nnunet_lomix.loss.lomix import FinestOutput
from nnunet_lomix.nnunet.checkpoints import read_checkpoint
from nnunet_lomix.nnunet.results import LATEST

from ..conftest import LABELS
from .conftest import LoMixTiny, assert_same, log_of, send_behind, targets

pytestmark = pytest.mark.end_to_end
CPU = torch.device("cpu")
SECONDS = 120  # in which all ranks must have ended
ENDED = (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException)
# Started once, with the long imports done; each process is a copy of it.
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class Scenario(NamedTuple):
    batch_size: int  # of all ranks together
    batch_dice: bool
    labels: str
    stride: int
    anchor: str = "deep_supervision"
    steps: int = 1  # more where the anchor isn't nnU-Net's, whose Dice is in single precision


# nnU-Net's own Dice of a joint batch fails where ranks have parts of different sizes
SCENARIOS = {
    2: [
        Scenario(4, True, "ignore", 2),
        Scenario(5, True, "classes", 1, "z_0", 3),
        Scenario(5, False, "ignore", 2),
    ],
    4: [
        Scenario(6, True, "ignore", 2, "z_0", 3),
        Scenario(7, False, "regions_ignore", 2),
    ],
}


class Double(LoMixTiny):
    """In double precision, and AdamW makes no step of a rounding error, where a gradient is 0 as a rule's at first."""

    scenario: Scenario

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        settings = {"batch_size": self.scenario.batch_size, "batch_dice": self.scenario.batch_dice}
        self.configuration_manager.configuration |= settings
        self.device, self.grad_scaler = CPU, None  # nnU-Net takes it for granted that DDP is on GPUs

    @staticmethod
    def build_network_architecture(plans_manager, *args, **kwargs):  # nnU-Net asks for the first name
        return LoMixTiny.build_network_architecture(plans_manager, *args, **kwargs).double()

    def make_loss(self, *args, **kwargs):
        loss = super().make_loss(*args, **kwargs).double()
        rank = dist.get_rank() if dist.is_initialized() else 0
        with torch.no_grad():  # those of other ranks must be overwritten by those of rank 0
            for p in loss.parameters():
                p.add_(rank)
        return loss

    def configure_loss_optimizer(self):
        optimizer = super().configure_loss_optimizer()
        for group in optimizer.param_groups:
            group["eps"] = 1e-3
        return optimizer


def of_ranks(criterion, sizes, joint, compute):
    """The formula above in one process, for a loss of the joint batch.

    ``compute`` is called with the samples of a rank, or with all, and sees the weights of the criterion's two terms.
    """

    def terms(samples, weight_ce, weight_dice):
        criterion.weight_ce, criterion.weight_dice = weight_ce, weight_dice
        value = compute(samples)
        criterion.weight_ce = criterion.weight_dice = 1.0
        return value

    mean = torch.stack([terms(s, 1.0, 0.0 if joint else 1.0) for s in samples_of_ranks(sizes)]).mean(0)
    return mean + terms(slice(None), 0.0, 1.0) if joint else mean


class JointLoss(LoMixLoss):
    """A loss of the joint batch, as the ranks compute it."""

    sizes: list[int]

    def losses(self, outputs, target):
        losses = super().losses

        def compute(samples):
            return losses([z[samples] for z in outputs], target[0][samples])

        return of_ranks(self.criterion, self.sizes, self.criterion.batch_dice, compute)


class JointAnchor(nn.Module):
    """The same for the anchor of a loss."""

    def __init__(self, loss):
        super().__init__()
        self.anchor, self.sizes, self.batch_dice = loss.anchor, loss.sizes, loss.criterion.batch_dice
        self.criterion = loss.anchor.criterion if isinstance(loss.anchor, FinestOutput) else loss.anchor.loss

    def forward(self, outputs, target):
        def compute(samples):
            return self.anchor([z[samples] for z in outputs], [t[samples] for t in target])

        return of_ranks(self.criterion, self.sizes, self.batch_dice, compute)


def sizes_of_ranks(batch_size, world_size):
    """As nnU-Net distributes a batch: the first ranks have one sample more."""
    return [batch_size // world_size + (rank < batch_size % world_size) for rank in range(world_size)]


def samples_of_ranks(sizes):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def joint_batch(trainer, seed, samples=slice(None)):
    """Noise, and a target that follows it; some samples have more ignored pixels than others."""
    generator = torch.Generator().manual_seed(seed)
    size, scenario = trainer.configuration_manager.patch_size, trainer.scenario
    data = torch.randn(scenario.batch_size, 1, *size, generator=generator, dtype=torch.float64)
    labels = (data > 0).float() + (data > 1)
    share = torch.linspace(0, 0.8, scenario.batch_size).view(-1, 1, 1, 1)
    ignored = torch.rand(labels.shape, generator=generator) < share
    target = labels.masked_fill(ignored, 3) if scenario.labels == "ignore" else labels
    if scenario.labels == "regions_ignore":
        target = torch.cat([labels > 0, labels > 1, ignored], 1).float()
    names = [f"case_{i}" for i in range(scenario.batch_size)]
    return {"data": data[samples], "target": targets(trainer, target[samples]), "keys": names[samples]}


def make_trainer(plans, scenario, cls=Double):
    dataset_json = {"channel_names": {"0": "MRI"}, "labels": LABELS[scenario.labels], "file_ending": ".nii.gz"}
    if "regions" in scenario.labels:
        dataset_json["regions_class_order"] = [1, 2]
    attributes = {"scenario": scenario, "stride": scenario.stride, "anchor": scenario.anchor}
    torch.manual_seed(0)
    trainer = type("Double", (cls,), attributes)(plans | {"continue_training": False}, "2d", 0, dataset_json, CPU)
    trainer.initialize()
    trainer.network.train()
    return trainer


def state_of(trainer):
    network = trainer.network.module if trainer.is_ddp else trainer.network
    modules = {"network": network, "loss": trainer.loss}
    parameters = {f"{name} {key}": p for name, m in modules.items() for key, p in m.named_parameters()}
    return {
        "gradients": {key: p.grad for key, p in parameters.items()},
        "parameters": {key: p.data for key, p in parameters.items()},
        "weights": trainer.loss.weights(),
        "steps": trainer.loss.rule.steps,
    }


def start_rank(rank, world_size, variables, store):
    """What every process does first."""
    import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as host

    os.environ.update(variables)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    host.DDP = lambda network, device_ids: DistributedDataParallel(network)  # no GPU here


def run_scenarios(rank, world_size, variables, plans, folder):
    """All that is to be known of one rank: the states after all scenarios, and a fault."""
    start_rank(rank, world_size, variables, folder / "store")
    states = []
    for scenario in SCENARIOS[world_size]:
        trainer = make_trainer(plans, scenario)
        sizes = sizes_of_ranks(scenario.batch_size, world_size)
        assert trainer.batch_size == sizes[rank]  # as nnU-Net has it
        for step in range(scenario.steps):
            trainer.train_step(joint_batch(trainer, step, samples_of_ranks(sizes)[rank]))
        states.append(state_of(trainer))
    torch.save([states, skip_together(rank, plans)], folder / f"rank_{rank}")
    dist.barrier()
    dist.destroy_process_group()


def skip_together(rank, plans):
    """Rank 1 alone has logits that aren't finite: what each rank has then, and the log of the first."""
    trainer = make_trainer(plans, Scenario(4, False, "classes", 2))
    sizes = sizes_of_ranks(4, dist.get_world_size())
    samples = samples_of_ranks(sizes)[rank]
    results = [trainer.train_step(joint_batch(trainer, 0, samples))]
    before = {k: p.clone() for k, p in trainer.network.named_parameters()}
    hook = trainer.network.register_forward_hook(lambda module, inputs, outputs: [z * torch.nan for z in outputs])
    if rank != 1:
        hook.remove()
    results.append(trainer.train_step(joint_batch(trainer, 1, samples)))
    same = all(torch.equal(p, before[k]) for k, p in trainer.network.named_parameters())
    made, faults = trainer.faults.step_was_made(), len(trainer.faults.losses)
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end(results)
    return same, made, faults, log_of(trainer) if rank == 0 else ""


@pytest.fixture
def launch(prepared, tmp_path, monkeypatch):
    """Starts ranks as nnU-Net does, but for the start method; gives their plans and the processes."""
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root)  # the processes import this module
    multiprocessing.get_context(START).set_forkserver_preload([__name__])
    nnunet = prepared("classes")
    variables = {**nnunet.variables, "nnUNet_results": str(tmp_path)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    plans = json.loads((nnunet.preprocessed / "Dataset701_classes" / "nnUNetPlans.json").read_text())

    def start(function, world_size):
        return multiprocessing.start_processes(
            function, (world_size, variables, plans, tmp_path), world_size, join=False, start_method=START
        )

    start.plans = plans
    return start


def wait(context):
    """Until all ranks have ended, however they did; a hang fails the test."""
    end = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < end, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()


@pytest.mark.parametrize("world_size", SCENARIOS)
def test_several_steps_of_several_ranks_equal_one_process(launch, tmp_path, world_size):
    wait(launch(run_scenarios, world_size))
    ranks = [torch.load(tmp_path / f"rank_{rank}") for rank in range(world_size)]
    for number, scenario in enumerate(SCENARIOS[world_size]):
        states = [states[number] for states, _ in ranks]
        for state in states[1:]:
            gradients = {k: g for k, g in state["gradients"].items() if k.startswith("network")}
            assert_same(state | {"gradients": gradients}, states[0] | {"gradients": gradients})

        class OneProcess(Double):
            def make_loss(self, *args, world_size=world_size, scenario=scenario, **kwargs):
                loss = super().make_loss(*args, **kwargs)
                loss.__class__, loss.sizes = JointLoss, sizes_of_ranks(scenario.batch_size, world_size)
                loss.anchor = JointAnchor(loss)
                return loss

        alone = make_trainer(launch.plans, scenario, OneProcess)
        for step in range(scenario.steps):
            alone.train_step(joint_batch(alone, step))
        atol = 1e-9 if scenario.anchor == "z_0" else 1e-7
        torch.testing.assert_close(states[0], state_of(alone), rtol=1e-5, atol=atol)

    for rank, (_, (same, made, faults, log)) in enumerate(ranks):
        assert (same, made, faults) == (True, False, int(rank == 1))
        assert rank or "losses in training that weren't finite: 1; maps: z_0, z_1" in log
        assert rank or f"cases: {'case_2, case_3' if world_size == 2 else 'case_1'}." in log


def die(rank, world_size, variables, plans, folder, how):
    """A training in which rank 1 dies in its second step, as the others go on."""
    start_rank(rank, world_size, variables, folder / "store")
    trainer = make_trainer(plans, Scenario(4, True, "classes", 2))
    samples = samples_of_ranks(sizes_of_ranks(4, world_size))[rank]
    for step in range(100):
        batch = joint_batch(trainer, step, samples)
        if rank == 1 and step == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            batch["data"][0, 0, 3, 3] = torch.nan
        trainer.train_step(batch)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", "process 1 terminated with signal SIGKILL"),
        ("image", "Epoch 0: the preprocessed image of case_2 has values"),
    ],
)
def test_a_rank_that_dies_ends_the_others_with_a_message(launch, how, message):
    context = launch(functools.partial(die, how=how), 2)
    # of itself, as under a launcher that doesn't end it; nnU-Net's ends all when one has ended
    context.processes[0].join(SECONDS)
    assert context.processes[0].exitcode == 1
    with pytest.raises(ENDED) as raised:
        wait(context)
    assert message in str(raised.value) or re.search("closed by peer|remote worker", str(raised.value))


def stop(rank, world_size, variables, plans, folder):
    """A whole training; all ranks get a signal in its second step, as from a scheduler."""
    start_rank(rank, world_size, variables, folder / "store")
    trainer = make_trainer(plans, Scenario(4, True, "classes", 2))
    batches = functools.partial(joint_batch, trainer, samples=samples_of_ranks(sizes_of_ranks(4, world_size))[rank])
    trainer.get_dataloaders = lambda: (map(batches, itertools.count()), map(batches, itertools.count()))
    trainer.num_iterations_per_epoch = 5
    send_behind(trainer, "train_step", 2)
    trainer.run_training()


def test_a_signal_to_all_ranks_leaves_a_checkpoint_of_rank_0(launch, tmp_path):
    context = launch(stop, 2)
    context.processes[0].join(SECONDS)
    assert context.processes[0].exitcode == 128 + signal.SIGTERM
    with pytest.raises(ENDED):
        wait(context)
    (file,) = tmp_path.glob("*/*/fold_0/*.pth")
    checkpoint = read_checkpoint(file)
    assert (file.name, checkpoint["current_epoch"], checkpoint["lomix"]["loss"]["rule.steps"]) == (LATEST, 0, 2)
    alone = make_trainer(launch.plans, Scenario(4, True, "classes", 2))
    alone.load_checkpoint(str(file))
    assert alone.loss.rule.steps == 2
