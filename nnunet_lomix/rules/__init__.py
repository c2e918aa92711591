"""How much each map counts. A rule is one file with one registration; see :class:`WeightingRule`."""

from nnunet_lomix.rules.alignment import Alignment, AlignmentHeldOut
from nnunet_lomix.rules.barrier import Barrier
from nnunet_lomix.rules.base import RULES, WeightingRule
from nnunet_lomix.rules.equal import Equal
from nnunet_lomix.rules.fade import FadeIn, FadeOut
from nnunet_lomix.rules.inverse import Inverse
from nnunet_lomix.rules.normalised import Normalised
from nnunet_lomix.rules.softplus import Softplus

__all__ = [
    "RULES",
    "Alignment",
    "AlignmentHeldOut",
    "Barrier",
    "Equal",
    "FadeIn",
    "FadeOut",
    "Inverse",
    "Normalised",
    "Softplus",
    "WeightingRule",
]
