"""How times and memory are measured, by all benchmarks alike."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

Result = TypeVar("Result")
Spread = dict[str, float]  # "median", "p20" and "p80"


def now(device: str) -> float:
    """Seconds of a clock, once the device has done all that it was told to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(
    measurements: Mapping[str, Callable[[], Sequence[float]]], turns: int, warm_up: int
) -> dict[str, np.ndarray]:
    """Call one after the other, turn by turn, so that all suffer the same noise.

    Args:
        measurements: functions that measure one pass and return the seconds of its parts.
        turns: how many passes of each are kept.
        warm_up: how many come before and aren't.

    Returns:
        For each name an array ``(turns, parts)`` of seconds.
    """
    seconds: dict[str, list[Sequence[float]]] = {name: [] for name in measurements}
    for _ in range(warm_up + turns):
        for name, measure in measurements.items():
            seconds[name].append(measure())
    return {name: np.array(passes[warm_up:]) for name, passes in seconds.items()}


def spread(values: Iterable[float]) -> Spread:
    """The median, and the 20th and 80th percentile.

    >>> spread([1, 2, 3, 4, 5, 6])
    {'median': 3.5, 'p20': 2.0, 'p80': 5.0}
    """
    p20, median, p80 = np.percentile(np.asarray(values), [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def milliseconds(seconds: np.ndarray) -> Spread:
    """The spread of times ``(turns,)`` in seconds."""
    return spread(1000 * seconds)


def in_its_own_process(function: Callable[..., Result], *args: object) -> Result:
    """What ``function`` returns in a fresh Python, whose memory nothing else has used."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory(work: Callable[[], object], device: str) -> int | None:
    """Megabytes that ``work`` needs at most beyond what there was before.

    On CUDA what PyTorch allocates; on a CPU what the whole process holds, which only Linux tells (None elsewhere).
    Memory that the process has used before and keeps isn't counted, so ``work`` needs a process of its own.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) // 2**20
    restart_peak = Path("/proc/self/clear_refs")
    if not restart_peak.exists():
        return None
    restart_peak.write_text("5")  # getrusage could not: it gives the peak of the parent, too
    before = peak_of_process()
    work()
    return (peak_of_process() - before) // 2**10


def peak_of_process() -> int:
    """Kilobytes that this process has held at most. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
