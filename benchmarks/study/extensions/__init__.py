"""Rules and losses that were tried with LoMix and haven't paid, as extensions of nnunet_lomix; see docs/results.md.

Each module is one idea, made by the public interface alone, as yours would be: a rule is registered in ``RULES``, a
loss is a subclass of ``LoMixLoss``, and where a rule or a loss needs something from the training, a subclass of
``nnUNetTrainerLoMix`` gives it. To import this package registers its rules.
"""

from extensions.alignment import Alignment, AlignmentHeldOut, measure_alignment, nnUNetTrainerLoMixAlignment
from extensions.distillation import DistillingLoMixLoss, nnUNetTrainerLoMixDistillation
from extensions.fade import FadeIn, FadeOut, Fading, nnUNetTrainerLoMixFading
from extensions.inverse import Inverse
from extensions.normalised import Normalised

__all__ = [
    "Alignment",
    "AlignmentHeldOut",
    "DistillingLoMixLoss",
    "FadeIn",
    "FadeOut",
    "Fading",
    "Inverse",
    "Normalised",
    "measure_alignment",
    "nnUNetTrainerLoMixAlignment",
    "nnUNetTrainerLoMixDistillation",
    "nnUNetTrainerLoMixFading",
]
