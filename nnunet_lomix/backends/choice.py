"""Which backend computes a case: by a rule on a CPU, by a trial on a GPU, as cuDNN's benchmark mode chooses."""

import logging
from time import perf_counter

import torch
from torch import Tensor

from nnunet_lomix.backends.base import BACKENDS, log_once
from nnunet_lomix.backends.fused import TOLERANCE, difference, unsupported
from nnunet_lomix.terms import Statistics

MOST_VALUES_FOR_PLAIN = 2**25  # of all maps together: half a gigabyte of memory
TURNS = 3  # of each backend in a trial; the first one compiles and warms up
logger = logging.getLogger(__name__)
chosen = {}  # the name of the backend, for each case that was tried


def fastest(outputs, target, mixers, terms, compile: bool = False) -> Statistics:
    """By the fastest backend that needs little memory; ``compile`` says whether torch.compile is welcome."""
    names = candidates(outputs, mixers, terms, compile)
    name = names[0] if len(names) == 1 else choose(names, outputs, target, mixers, terms)
    return BACKENDS[name](outputs, target, mixers, terms)


def candidates(outputs, mixers, terms, compile: bool) -> list[str]:
    """Backends that may be the fastest, the most trusted first."""
    small = outputs[0].numel() * len(mixers) <= MOST_VALUES_FOR_PLAIN
    lean = "compiled" if compile else "lean"
    if not outputs[0].is_cuda:
        return ["plain" if small else lean]
    names = [*["plain"] * small, lean]
    return names if unsupported(outputs, mixers, terms) else [*names, "fused"]


def choose(names: list[str], outputs, target, mixers, terms) -> str:
    """The one that was fastest when such a case came first; the number of maps may vary, as in a sample of mutants."""
    case = (*names, *(z.shape for z in outputs), outputs[0].dtype, outputs[0].device, type(terms), terms.ignores)
    if case not in chosen:
        times = compare(names, outputs, target, mixers, terms)
        chosen[case] = min(times, key=times.get, default=names[0])
        text = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in times.items())
        logger.info("LoMix: forward and backward pass of the loss by each backend: %s", text)
    return chosen[case]


def compare(names: list[str], outputs, target, mixers, terms) -> dict[str, float]:
    """Seconds of a forward and a backward pass by each backend that works, and agrees with the first that does."""
    times, trusted = {}, None
    for name in names:
        try:
            seconds, sums = trial(name, outputs, target, mixers, terms)
        except Exception as error:  # whatever a driver or compiler says: another backend does the work
            log_once(f"LoMix: the backend {name!r} isn't used, it failed ({type(error).__name__}: {error})")
            continue
        trusted = trusted or sums
        if (error := difference(trusted, sums)) < TOLERANCE:
            times[name] = seconds
        else:
            log_once(f"LoMix: the backend {name!r} isn't used, it differs from the others by up to {error:.1%}")
    return times


def trial(name: str, outputs, target, mixers, terms) -> tuple[float, list[Tensor]]:
    """Seconds of a forward and a backward pass; the statistics, and sums of the gradients."""
    leaves = [z.detach().requires_grad_() for z in outputs]
    parameters = [p for mix, _ in mixers for p in mix.parameters() if p.requires_grad]
    times = []
    for _ in range(TURNS):
        start = now(outputs[0])
        with torch.enable_grad():
            statistics = list(vars(BACKENDS[name](leaves, target, mixers, terms)).values())
            total = sum(s.mean() for s in statistics)
        gradients = torch.autograd.grad(total, [*leaves, *parameters], materialize_grads=True)
        times.append(now(outputs[0]) - start)
    return min(times[1:]), [*(s.detach() for s in statistics), *(g.abs().sum() for g in gradients)]


def now(z: Tensor) -> float:
    """Seconds, when all work on the device of ``z`` is done."""
    torch.cuda.synchronize(z.device)
    return perf_counter()
