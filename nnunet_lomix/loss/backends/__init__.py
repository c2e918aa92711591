"""How the sums over pixels of all maps are computed. A backend is one file with one registration.

- ``plain``: any operator on any device, map by map;
- ``fused``: Triton kernels for CUDA.

See :class:`~nnunet_lomix.loss.backends.base.Backend` for the interface, and
:func:`~nnunet_lomix.loss.backends.base.choose` for which one is used.
"""

from nnunet_lomix.loss.backends import fused, plain  # noqa: F401  register themselves
from nnunet_lomix.loss.backends.base import BACKENDS, Backend, Case, choose

__all__ = ["BACKENDS", "Backend", "Case", "choose"]
