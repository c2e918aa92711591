"""Which backend computes a case: by a rule, or on CUDA by a trial, as cuDNN's benchmark mode chooses."""

from time import perf_counter

import torch
from torch import Tensor

from nnunet_lomix.backends import compiled
from nnunet_lomix.backends.base import BACKENDS, log_once
from nnunet_lomix.backends.fused import TOLERANCE, difference, unsupported
from nnunet_lomix.terms import Statistics

MOST_VALUES_FOR_PLAIN = 2**25  # of all maps together: less than a gigabyte of memory
TURNS = 3  # of each backend in a trial; the first one compiles and warms up
chosen = {}  # the name of the backend, for each case that was tried


def fastest(outputs, target, mixers, terms, compile: bool = False) -> Statistics:
    """By the fastest backend that fits; ``compile`` says whether torch.compile is welcome."""
    names = candidates(outputs, mixers, terms, compile)
    size = len(mixers).bit_length()  # about: a sample of mutants has another number of maps at every step
    case = (*names, *(z.shape for z in outputs), outputs[0].device, size, type(terms), terms.ignores)
    if len(names) > 1 and case not in chosen and torch.is_grad_enabled():
        times = compare(names, outputs, target, mixers, terms)
        if times:
            chosen[case] = min(times, key=times.get)
            text = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in times.items())
            log_once(f"LoMix: the backend {chosen[case]!r} computes the loss of {len(mixers)} maps ({text})")
    return BACKENDS[chosen.get(case, names[0])](outputs, target, mixers, terms)


def candidates(outputs, mixers, terms, compile: bool) -> list[str]:
    """Backends that may be the fastest, the most trusted first; by itself the first is a good choice."""
    small = outputs[0].numel() * len(mixers) <= MOST_VALUES_FOR_PLAIN
    if not outputs[0].is_cuda:
        return ["plain" if small else "compiled" if compile else "lean"]
    why_not_fused = unsupported(outputs, mixers, terms)
    if why_not_fused:
        log_once(f"LoMix: the backend 'fused' isn't used: {why_not_fused}")
    return ["plain"] * small + ["lean"] + ["compiled"] * compile + ["fused"] * (not why_not_fused)


def compare(names: list[str], outputs, target, mixers, terms) -> dict[str, float]:
    """Seconds of a forward and a backward pass by each backend that works, and agrees with the first that does.

    None of any, if the outputs aren't finite.
    """
    times, trusted = {}, None
    for name in names:
        now(outputs[0])  # what was wrong before isn't the backend's fault
        try:
            seconds, sums = trial(name, outputs, target, mixers, terms)
        except Exception as error:  # whatever a driver or compiler says: another backend does the work
            log_once(f"LoMix: the backend {name!r} isn't used, it failed ({type(error).__name__}: {error})")
            continue
        if name == "compiled" and compiled.failed:
            continue  # that was lean, and the log says why
        if trusted is None:
            if not all(s.isfinite().all() for s in sums):
                return {}
            trusted = sums
        if (error := difference(trusted, sums)) < TOLERANCE:
            times[name] = seconds
        else:
            log_once(f"LoMix: the backend {name!r} isn't used, it differs from the others by up to {error:.1%}")
    return times


def trial(name: str, outputs, target, mixers, terms) -> tuple[float, list[Tensor]]:
    """Seconds of a forward and a backward pass; and the statistics, and sums that show whether the gradients are right.

    Each statistic has a derivative of its own, else the gradient of another map or class would be right, too.
    """
    leaves = [z.detach().requires_grad_() for z in outputs]
    parameters = [p for mix, _ in mixers for p in mix.parameters() if p.requires_grad]
    times = []
    for _ in range(TURNS):
        start = now(outputs[0])
        statistics = list(vars(BACKENDS[name](leaves, target, mixers, terms)).values())
        by = [torch.linspace(0.5, 2, s.numel(), dtype=s.dtype, device=s.device).view_as(s) for s in statistics]
        gradients = torch.autograd.grad(statistics, [*leaves, *parameters], by, materialize_grads=True)
        times.append(now(outputs[0]) - start)
        sums = [ramp(g.flatten(2)) for g in gradients[: len(leaves)]]
        sums += [*gradients[len(leaves) :], *(s.detach() for s in statistics)]
        del gradients  # large ones must not lie beside those of the next turn
    return min(times[1:]), sums


def ramp(values: Tensor) -> Tensor:
    """Sums ``(B, C)`` over the pixels, ``(B, C, N)``, each with a factor of its own."""
    return values @ torch.linspace(0.5, 2, values.shape[2], dtype=values.dtype, device=values.device)


def now(z: Tensor) -> float:
    """Seconds, when all work on the device of ``z`` is done.

    Raises:
        RuntimeError: what went wrong in that work.
    """
    torch.cuda.synchronize(z.device)
    return perf_counter()
