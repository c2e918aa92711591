"""Time, memory and error of the LoMix loss: backend × shape × K, beside nnU-Net's deep supervision.

    pip install -e ".[benchmarks]"
    python benchmarks/loss.py                 # the cases of the device
    python benchmarks/loss.py --growth        # cost against K, and the picture loss_growth.png

Every backend of a case takes its turns in one process, so that all suffer the same noise; the figures are medians, with
the 20th and 80th percentile. Peak memory is measured in a process of its own: what the process has needed beyond the
outputs and the target. The error is the largest of value and gradients against float64, relative to the largest
gradient of the tensor.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn
from torch.nn import functional as F

from nnunet_lomix import LoMixLoss
from nnunet_lomix.backends import BACKENDS

NNUNET = "nnU-Net"


@dataclass(frozen=True)
class Case:
    batch: int
    classes: int
    size: tuple[int, ...]
    scales: int
    mixed: int
    regions: bool = False

    def __str__(self):
        shape = f"({self.batch}, {self.classes}{' regions' * self.regions}, {' × '.join(map(str, self.size))})"
        return f"{shape}, S = {self.scales}, K = {self.mixed}"


CASES = {
    "cpu": [
        Case(2, 14, (48, 48, 48), 5, 5),
        Case(8, 9, (256, 256), 4, 4),
        Case(2, 3, (48, 48, 48), 5, 5, regions=True),
        Case(2, 3, (40, 56, 40), 3, 3),
        Case(16, 3, (56, 40), 3, 3),
    ],
    "cuda": [
        Case(2, 14, (128, 128, 128), 5, 5),
        Case(2, 3, (128, 128, 128), 5, 4),
        Case(2, 3, (128, 128, 128), 5, 4, regions=True),
        Case(12, 4, (512, 512), 7, 4),
    ],
}
GROWTH = [Case(2, 4, (128, 128), 7, k) for k in range(2, 8)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each backend; default 5")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; default 1")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--case", type=int, help="only this one, by its number from 0")
    which.add_argument("--growth", action="store_true", help="cost against K, and the picture")
    parser.add_argument(
        "--memory", help='megabytes of one backend and case: ["lean", [batch, classes, [size], S, K, regions]]'
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        backend, case = json.loads(args.memory)
        print(peak_memory(backend, Case(*case), args.device))
        return
    print(f"{describe(args.device)}, torch {torch.__version__}\n")
    cases = GROWTH if args.growth else CASES[args.device]
    cases = cases if args.case is None else [cases[args.case]]
    table = pd.DataFrame([row for case in cases for row in measure(case, args.device, args.repeats)])
    print(table.to_markdown(index=False))
    if args.growth:
        draw_growth(table).savefig(Path(__file__).with_name("loss_growth.png"), dpi=110)


def describe(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return f"{name}, threads: {torch.get_num_threads()}"


def make_loss(backend: str, case: Case, device: str) -> nn.Module:
    if backend != NNUNET:
        kinds = {"mixed_scales": case.mixed, "regions": case.regions, "backend": backend}
        return LoMixLoss(case.classes, case.scales, **kinds).to(device)
    dice = {"batch_dice": False, "do_bg": case.regions, "smooth": 1e-5, "ddp": False}
    kind, entropy = (DC_and_BCE_loss, "bce_kwargs") if case.regions else (DC_and_CE_loss, "ce_kwargs")
    loss = kind(soft_dice_kwargs=dice, dice_class=MemoryEfficientSoftDiceLoss, **{entropy: {}})
    weights = np.array([1 / 2**i for i in range(case.scales)])
    weights[-1] = 0
    return DeepSupervisionWrapper(loss, weights / weights.sum())


def example(case: Case, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of a network, and the target at the size of each."""
    torch.manual_seed(0)
    sizes = [[max(1, s // 2**j) for s in case.size] for j in range(case.scales)]
    outputs = [torch.randn(case.batch, case.classes, *s, device=device, requires_grad=True) for s in sizes]
    values, channels = (2, case.classes) if case.regions else (case.classes, 1)
    target = torch.randint(values, (case.batch, channels, *case.size), device=device).float()
    return outputs, [F.interpolate(target, s) for s in sizes]


def measure(case: Case, device: str, repeats: int) -> list[dict]:
    """A row for nnU-Net and each backend."""
    names = [NNUNET, *(name for name in BACKENDS if name != "fused" or device == "cuda")]
    losses = {name: make_loss(name, case, device) for name in names}
    outputs, targets = example(case, device)
    times = {name: [] for name in names}
    for _ in range(repeats + 1):  # the first warms up
        for name, loss in losses.items():
            times[name].append(time_once(loss, outputs, targets, device))
    rows = []
    for name in names:
        forward, backward = np.array(times[name][1:]).T
        rows.append(
            {
                "case": str(case),
                "backend": name,
                "maps": case.scales - 1 if name == NNUNET else len(losses[name].maps),
                "forward": spread(forward),
                "backward": spread(backward),
                "full": spread(forward + backward),
                "memory, MB": memory_in_a_process(name, case, device),
                "error": "" if name == NNUNET else f"{error(losses[name], case, device):.0e}",
            }
        )
    return rows


def time_once(loss: nn.Module, outputs, targets, device: str) -> tuple[float, float]:
    """Seconds of a forward and a backward pass."""
    for p in [*outputs, *loss.parameters()]:
        p.grad = None
    start = now(device)
    value = loss(outputs, targets)
    middle = now(device)
    value.backward()
    return middle - start, now(device) - middle


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(seconds: np.ndarray) -> str:
    low, median, high = 1000 * np.percentile(seconds, [20, 50, 80])
    return f"{median:.4g} ({low:.4g} to {high:.4g}) ms"


def memory_in_a_process(backend: str, case: Case, device: str) -> int:
    argument = json.dumps([backend, list(vars(case).values())])
    command = [sys.executable, __file__, "--device", device, "--memory", argument]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_memory(backend: str, case: Case, device: str) -> int:
    """Megabytes that a forward and a backward pass need beyond the outputs and the target."""
    loss = make_loss(backend, case, device)
    small = Case(1, 2, tuple(8 for _ in case.size), 2, 2)
    time_once(make_loss(backend, small, device), *example(small, device), device)  # libraries are loaded
    data = example(case, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        time_once(loss, *data, device)
        return (torch.cuda.max_memory_allocated() - before) // 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; getrusage gives that of the parent, too
    before = peak_of_process()
    time_once(loss, *data, device)
    return (peak_of_process() - before) // 2**10


def peak_of_process() -> int:
    """Kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def error(loss: nn.Module, case: Case, device: str) -> float:
    outputs, targets = example(case, device)
    reference = make_loss("lean", case, device).double()  # equal to plain loops in float64, see the tests
    results = []
    for module, dtype in ((loss, torch.float32), (reference, torch.float64)):
        leaves = [z.detach().to(dtype).requires_grad_() for z in outputs]
        value = module.losses(leaves, targets).mean()
        results.append([value, *torch.autograd.grad(value, [*leaves, *module.mixers.parameters()])])
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in zip(*results, strict=True))


def draw_growth(table: pd.DataFrame):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for backend, rows in table.groupby("backend", sort=False):
        ax.plot([c.mixed for c in GROWTH], [float(t.split()[0]) for t in rows["full"]], marker="o", label=backend)
    ax.set(xlabel="mixed scales K", ylabel="forward and backward, ms", yscale="log", title=str(GROWTH[0])[:-7])
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
