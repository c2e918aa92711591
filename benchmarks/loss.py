"""Time, memory and error of LoMix's maps by each backend, beside nnU-Net's deep supervision."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from cases import NNUNET, Case
from examples import (
    backend_and_stride,
    count_maps,
    default_backend,
    losses_for,
    make_loss,
    make_outputs,
    make_targets,
    time_passes,
)
from measuring import Spread, milliseconds, take_turns
from memory import memory_of_loss
from results import Rows
from torch import nn

REPEATS = 9


def measure(cases: Sequence[Case], device: str, repeats: int, wanted: Sequence[str] = ()) -> Rows:
    """A row for each case and loss: the wanted ones, or else those of :func:`losses_for`.

    ``default`` is true for what the default trainer takes by itself. Times are milliseconds of a forward pass, of the
    backward pass, and of both; memory is megabytes beyond outputs and targets; the error is that of :func:`error`,
    None for nnU-Net.
    """
    rows = []
    for case in cases:
        names = losses_for(case, device, wanted)
        times = time_losses({name: make_loss(name, case, device) for name in names}, case, device, repeats)
        for name in names:
            rows.append(
                {
                    "case": str(case),
                    "backend": name,
                    "default": name == default_backend(case, device),
                    "maps": count_maps(name, case),
                    **times[name],
                    "memory_mb": memory_of_loss(name, case, device),
                    "error": None if name == NNUNET else error(name, case, device),
                }
            )
    return rows


def time_losses(losses: Mapping[str, nn.Module], case: Case, device: str, repeats: int) -> dict[str, dict[str, Spread]]:
    """Of each loss, which take turns: ``forward_ms``, ``backward_ms``, and ``full_ms`` of both passes."""
    outputs, targets = make_outputs(case, device), make_targets(case, device)
    passes = {name: partial(time_passes, loss, outputs, targets, device) for name, loss in losses.items()}
    times = {}
    for name, seconds in take_turns(passes, repeats, warm_up=1).items():
        forward, backward = seconds.T
        spreads = {"forward_ms": forward, "backward_ms": backward, "full_ms": forward + backward}
        times[name] = {part: milliseconds(values) for part, values in spreads.items()}
    return times


def error(name: str, case: Case, device: str) -> float:
    """The largest difference of value and gradients from float64, relative to the largest number of the same tensor."""
    outputs, targets = make_outputs(case, device), make_targets(case, device)
    _, stride = backend_and_stride(name)
    results = []
    for other, dtype in ((name, torch.float32), (f"plain, stride {stride}", torch.float64)):
        loss = make_loss(other, case, device).to(dtype)
        leaves = [z.detach().to(dtype).requires_grad_() for z in outputs]
        value = loss.losses(leaves, targets).mean()
        results.append([value, *torch.autograd.grad(value, [*leaves, *loss.operators.parameters()])])
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in zip(*results, strict=True))
