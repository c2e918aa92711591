"""The best mutant as a teacher of ``z_0``: self-distillation, beyond the paper."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_lomix.loss import LoMixLoss, Map
from nnunet_lomix.loss.backends.base import full_precision, resample
from nnunet_lomix.trainers import nnUNetTrainerLoMix


class DistillingLoMixLoss(LoMixLoss):
    """LoMix plus ``distillation`` · KL(teacher ‖ z_0), averaged over the valid pixels.

    The teacher is the map with the lowest loss on the batch, if that is lower than the loss of ``z_0``; it gets no
    gradient. As in self-distillation from deeper to shallower classifiers (Zhang et al., arXiv 1905.08094, without
    temperature), but from the mixtures to the output that inference uses.

    Args:
        distillation: factor of the divergence.
        regions: as for :class:`LoMixLoss`.
        args, kwargs: its other arguments.
    """

    def __init__(self, *args: Any, distillation: float, regions: bool = False, **kwargs: Any):
        super().__init__(*args, regions=regions, **kwargs)
        self.distillation = distillation
        self.log_probabilities = log_probabilities_of_regions if regions else log_probabilities_of_classes

    def forward(self, outputs: Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        target = target if isinstance(target, Tensor) else target[0]
        losses = self.losses(outputs, target)
        teacher = self.maps[int(losses.argmin())]
        return self.weigh(losses) + self.distillation * self.divergence(outputs, target, teacher)

    def divergence(self, outputs: Sequence[Tensor], target: Tensor, teacher: Map) -> Tensor:
        """KL(teacher ‖ z_0), a scalar: of classes, or of each region by itself, summed; a mean over valid pixels."""
        with full_precision(outputs[0].device.type):
            dtype = torch.promote_types(outputs[0].dtype, torch.float32)
            prepared = self.criterion.prepare(target, self.num_classes, dtype)
            with torch.no_grad():
                scales = [resample(outputs[j].to(dtype), prepared.size) for j in teacher.scales]
                log_p = self.log_probabilities(self.operators[teacher.name](scales))
            log_q = self.log_probabilities(outputs[0].to(dtype).flatten(2))
            divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum((0, 2))
            if prepared.valid is None:
                return divergence.mean()
            valid = prepared.valid[:, 0]
            return (divergence * valid).sum() / valid.sum().clamp_min(1)


def log_probabilities_of_classes(logits: Tensor) -> Tensor:
    """log p of each class: logits ``(B, C, N)`` to ``(1, B, C, N)``."""
    return logits.log_softmax(1)[None]


def log_probabilities_of_regions(logits: Tensor) -> Tensor:
    """log p of being inside and of being outside of each region: logits ``(B, C, N)`` to ``(2, B, C, N)``."""
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)])


class nnUNetTrainerLoMixDistillation(nnUNetTrainerLoMix):
    """LoMix in which the best map teaches ``z_0``.

    Attributes:
        distillation: factor of the divergence.
    """

    anchor = "z_0"
    distillation = 1.0

    def make_loss(self, *args: Any, **kwargs: Any) -> LoMixLoss:
        """A :class:`DistillingLoMixLoss` with the arguments of :class:`LoMixLoss`.

        Raises:
            ValueError: ``sampled_mutants`` is set.
        """
        if self.sampled_mutants is not None:
            raise ValueError("the teacher is chosen among all maps; leave out sampled_mutants")
        return DistillingLoMixLoss(*args, distillation=self.distillation, **kwargs)
