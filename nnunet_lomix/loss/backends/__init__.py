"""How the sums over pixels of all maps are computed: ``plain``, with any operator on any device, or ``fused``, on CUDA.

A backend is made for a case, and called with the outputs at N pixels, each ``(B, C, N)``, finest first, and the target
there; it gives the sums of all maps, ``(M, B, 1 + 2 C)``, as from :meth:`Criterion.pixel_sums`, differentiable.
``unsupported(case)`` is why it can't compute a case, as the end of a sentence, or None.
``pixels_at_once(batch, pixels, finest)`` is how many of the pixels of a grid may be computed together in each sample of
a batch; ``finest`` are those of the finest output.
"""

from nnunet_lomix.loss.backends.fused import Fused
from nnunet_lomix.loss.backends.plain import Case, Plain

__all__ = ["BACKENDS", "Backend", "Case", "choose"]

Backend = Fused | Plain
BACKENDS: dict[str, type[Fused] | type[Plain]] = {"fused": Fused, "plain": Plain}


def choose(case: Case, named: str | None = None) -> tuple[str, Backend, str | None]:
    """The backend for a case: the named one, or ``fused`` on CUDA and ``plain`` elsewhere.

    Returns:
        Its name, the backend, and if it isn't the one that should be taken, why that can't be used.
    """
    name = named or ("fused" if case.device.type == "cuda" else "plain")
    reason = BACKENDS[name].unsupported(case)
    if reason is None:
        return name, BACKENDS[name](case), None
    return "plain", Plain(case), f"{name!r} can't be used: {reason}"
