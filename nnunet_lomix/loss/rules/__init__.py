"""How much each map counts. A rule is one file with one registration; see :class:`WeightingRule`."""

from nnunet_lomix.loss.rules.barrier import Barrier
from nnunet_lomix.loss.rules.base import RULES, WeightingRule
from nnunet_lomix.loss.rules.equal import Equal
from nnunet_lomix.loss.rules.softplus import Softplus

__all__ = ["RULES", "Barrier", "Equal", "Softplus", "WeightingRule"]
