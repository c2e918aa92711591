"""How the statistics of all maps are computed. A backend is one file with one registration.

A backend is a function ``backend(outputs, target, mixers, terms)``:

- ``outputs``: the decoder outputs ``(B, C, *spatial_j)``, finest first, in the dtype of the computation;
- ``target``: a :class:`~nnunet_lomix.terms.Target`;
- ``mixers``: for each map the operator, a module, and the scales that it mixes;
- ``terms``: :class:`~nnunet_lomix.terms.Terms`.

It returns the :class:`~nnunet_lomix.terms.Statistics` of all maps, differentiable by the outputs and by the
parameters of the operators.
"""

from nnunet_lomix.backends import compiled, fused, lean, plain  # noqa: F401  register themselves
from nnunet_lomix.backends.base import BACKENDS
from nnunet_lomix.terms import Statistics

__all__ = ["BACKENDS", "fastest"]

MOST_VALUES_FOR_PLAIN = 2**25  # of all maps together: half a gigabyte of memory


def fastest(outputs, target, mixers, terms, compile: bool = False) -> Statistics:
    """Plain as long as it needs little memory, else lean or, to ``compile``, compiled. Not fused: no GPU has run it."""
    values = outputs[0].numel() * len(mixers)
    name = "plain" if values <= MOST_VALUES_FOR_PLAIN else "compiled" if compile else "lean"
    return BACKENDS[name](outputs, target, mixers, terms)
