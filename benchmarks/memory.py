"""Memory of a forward and a backward pass of the loss alone, for cases that take a CPU too long to repeat."""

from collections.abc import Sequence
from functools import partial

import torch
from cases import Case
from examples import count_maps, losses_for, make_loss, make_outputs, make_targets, time_passes
from measuring import in_its_own_process, peak_memory
from results import Rows

REPEATS = 1


def measure(cases: Sequence[Case], device: str, repeats: int, wanted: Sequence[str] = ()) -> Rows:
    """A row for each case and loss; the least of ``repeats`` measurements, megabytes beyond outputs and targets."""
    rows = []
    for case in cases:
        for name in losses_for(case, device, wanted):
            known = [mb for _ in range(repeats) if (mb := memory_of_loss(name, case, device)) is not None]
            maps, megabytes = count_maps(name, case), min(known, default=None)
            rows.append({"case": str(case), "backend": name, "maps": maps, "memory_mb": megabytes})
    return rows


def memory_of_loss(name: str, case: Case, device: str) -> int | None:
    """Megabytes beyond outputs and targets; None where the system doesn't tell."""
    return in_its_own_process(_memory_of_loss, name, case, device, torch.get_num_threads())


def _memory_of_loss(name: str, case: Case, device: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    small = Case(1, 2, tuple(8 for _ in case.size), 2, 2)
    # a first pass, so that libraries are loaded
    time_passes(make_loss(name, small, device), make_outputs(small, device), make_targets(small, device), device)
    loss, outputs, targets = make_loss(name, case, device), make_outputs(case, device), make_targets(case, device)
    return peak_memory(partial(time_passes, loss, outputs, targets, device), device)
