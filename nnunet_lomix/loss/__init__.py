"""The LoMix loss, in plain PyTorch: it serves any deeply supervised network, and imports torch alone.

Five ideas are apart, each usable by itself:

- *which maps* are supervised: :mod:`~nnunet_lomix.loss.maps`, :mod:`~nnunet_lomix.loss.operators`;
- *where*: :mod:`~nnunet_lomix.loss.grid`;
- *how much each counts*: :mod:`~nnunet_lomix.loss.rules`;
- *what a map costs*: :mod:`~nnunet_lomix.loss.criterion`;
- *how it is computed*: :mod:`~nnunet_lomix.loss.backends`.

:class:`LoMixLoss` puts them together.
"""

from nnunet_lomix.loss.backends import BACKENDS
from nnunet_lomix.loss.lomix import DEFAULT_OPERATORS, LoMixLoss
from nnunet_lomix.loss.maps import ORIGINAL, Map, list_maps
from nnunet_lomix.loss.operators import OPERATORS, Operator
from nnunet_lomix.loss.rules import RULES, WeightingRule

__all__ = [
    "BACKENDS",
    "DEFAULT_OPERATORS",
    "OPERATORS",
    "ORIGINAL",
    "RULES",
    "LoMixLoss",
    "Map",
    "Operator",
    "WeightingRule",
    "list_maps",
]
