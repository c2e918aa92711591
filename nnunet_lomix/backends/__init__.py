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
from nnunet_lomix.backends.choice import fastest

__all__ = ["BACKENDS", "fastest"]
