"""A whole training step of nnU-Net, nnUNetTrainer against nnUNetTrainerLoMix: time and peak memory.

    pip install -e ".[benchmarks]"
    python benchmarks/step.py

nnU-Net's own networks as its planner configures them, random images. A step is that of nnUNetTrainer.train_step:
forward (under autocast on CUDA, network compiled), loss, backward, clipping, SGD; then the step of the loss's own
optimiser. Every loss takes its turns in one process; the figures are medians, with the 20th and 80th percentile. On a
CPU: one thread, small patches, no memory.
"""

import argparse
from dataclasses import dataclass

import pandas as pd
import torch
from loss import NNUNET, Case, describe, make_loss, now, spread
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch.nn import functional as F


@dataclass(frozen=True)
class Plan:
    """What nnU-Net's planner decides: PlainConvUNet, stages halve all axes."""

    name: str
    classes: int
    batch: int
    patch: tuple[int, ...]
    stages: int
    mixed: int

    @property
    def case(self) -> Case:
        return Case(self.batch, self.classes, self.patch, self.stages - 1, self.mixed)


PLANS = {
    "cpu": [Plan("2d, as Hippocampus", 3, 16, (56, 40), 4, 3), Plan("3d, as Hippocampus", 3, 2, (40, 56, 40), 4, 3)],
    "cuda": [
        Plan("3d_fullres", 14, 2, (128, 128, 128), 6, 5),
        Plan("3d_fullres", 14, 2, (128, 128, 128), 6, 4),
        Plan("3d_fullres", 3, 2, (128, 128, 128), 6, 4),
        Plan("2d", 4, 12, (512, 512), 8, 4),
    ],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{describe(args.device)}, torch {torch.__version__}\n")
    rows = [row for plan in PLANS[args.device] for row in measure(plan, args.device, args.repeats)]
    print(pd.DataFrame(rows).to_markdown(index=False))


def build(plan: Plan) -> torch.nn.Module:
    dim = len(plan.patch)
    kwargs = {
        "n_stages": plan.stages,
        "features_per_stage": [min(512 if dim == 2 else 320, 32 * 2**i) for i in range(plan.stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": [[3] * dim] * plan.stages,
        "strides": [[1] * dim] + [[2] * dim] * (plan.stages - 1),
        "n_conv_per_stage": [2] * plan.stages,
        "n_conv_per_stage_decoder": [2] * (plan.stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    needed = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    return get_network_from_plans(name, kwargs, needed, 1, plan.classes, True, True)


def measure(plan: Plan, device: str, repeats: int) -> list[dict]:
    names = [NNUNET, "plain", "lean"] if device == "cpu" else [NNUNET, "lean", "compiled", "fused"]
    torch.manual_seed(0)
    network = build(plan).to(device)
    if device == "cuda":  # as nnU-Net does
        network = torch.compile(network)
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
    losses = {name: make_loss(name, plan.case, device) for name in names}
    own = {name: torch.optim.AdamW(p, 1e-2) for name, loss in losses.items() if (p := list(loss.parameters()))}
    data = torch.randn(plan.batch, 1, *plan.patch, device=device)
    target = torch.randint(plan.classes, (plan.batch, 1, *plan.patch), device=device).float()
    targets = [F.interpolate(target, [s // 2**j for s in plan.patch]) for j in range(plan.stages - 1)]
    times, memory = {name: [] for name in names}, dict.fromkeys(names, 0)
    for turn in range(repeats + 2):  # the first two warm up
        for name, loss in losses.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = now(device)
            step(network, loss, optimizer, own.get(name), scaler, data, targets, device)
            if turn > 1:
                times[name].append(now(device) - start)
            if device == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() / 2**20
    reference = pd.Series(times[NNUNET])
    return [
        {
            "network": plan.name,
            "case": str(plan.case),
            "loss": name,
            "maps": len(losses[name].maps) if name != NNUNET else plan.stages - 2,
            "step": spread(pd.Series(times[name]).to_numpy()),
            "relative": f"{(pd.Series(times[name]) / reference).median():.2f}",
            "peak memory, MB": f"{memory[name]:.0f}" if device == "cuda" else "",
        }
        for name in names
    ]


def step(network, loss, optimizer, own, scaler, data, targets, device: str):
    """As nnUNetTrainer.train_step of nnU-Net 2.8.1; with an ``own`` optimiser as nnUNetTrainerLoMix.train_step."""
    if own:
        own.zero_grad(set_to_none=True)
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, enabled=device == "cuda"):
        value = loss(network(data), targets)
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
    scaler.step(optimizer)
    scaler.update()
    if own and all(p.grad.isfinite().all() for group in own.param_groups for p in group["params"]):
        own.step()


if __name__ == "__main__":
    main()
