"""LoMix for nnU-Net v2: deep supervision on learned mixtures of all decoder scales.

``import torch`` imports this package (see :mod:`nnunet_lomix.nnunet.registration`), so nothing heavy may be
imported here: :class:`LoMixLoss` is loaded when it is first asked for.
"""

import os

__version__ = "0.2.0"
__all__ = ["LoMixLoss"]

# An installation has the trainers in this folder. A clone has them beside it, and Python, started in the clone's own
# folder, takes this package from there, whatever is installed.
if not os.path.isdir(os.path.join(__path__[0], "trainers")):
    __path__.append(os.path.dirname(__path__[0]))


def __getattr__(name: str) -> object:
    if name == "LoMixLoss":
        from nnunet_lomix.loss import LoMixLoss

        return LoMixLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
