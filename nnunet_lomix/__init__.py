"""LoMix for nnU-Net v2: deep supervision on learned mixtures of all decoder scales.

``import torch`` imports this package (see :mod:`nnunet_lomix.registration`), so nothing heavy may be
imported here: :class:`LoMixLoss` is loaded when it is first asked for.
"""

__version__ = "0.1.0"
__all__ = ["LoMixLoss"]


def __getattr__(name):
    if name == "LoMixLoss":
        from nnunet_lomix.loss import LoMixLoss

        return LoMixLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
