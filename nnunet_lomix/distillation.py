"""The best mutant as a teacher of ``z_0``: self-distillation, beyond the paper."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_lomix.backends.base import full_precision, resample
from nnunet_lomix.loss import LoMixLoss
from nnunet_lomix.maps import Map


class DistillingLoMixLoss(LoMixLoss):
    """LoMix plus ``distillation`` · KL(teacher ‖ z_0), averaged over the valid pixels.

    The teacher is the map with the lowest loss on the batch, if that is lower than the loss of ``z_0``; it gets no
    gradient. As in self-distillation from deeper to shallower classifiers (Zhang et al., arXiv 1905.08094, without
    temperature), but from the mixtures to the output that inference uses.

    Args:
        distillation: factor of the divergence.
        args, kwargs: those of :class:`LoMixLoss`.
    """

    def __init__(self, *args, distillation: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.distillation = distillation

    def forward(self, outputs: Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        target = target if isinstance(target, Tensor) else target[0]
        losses = self.losses(outputs, target)
        teacher = self.maps[int(losses.argmin())]
        return self.weigh(losses) + self.distillation * self.divergence(outputs, target, teacher)

    def divergence(self, outputs: Sequence[Tensor], target: Tensor, teacher: Map) -> Tensor:
        """KL(teacher ‖ z_0), a scalar: of classes, or of each region by itself, summed; a mean over valid pixels."""
        with full_precision(outputs[0].device.type):
            dtype = torch.promote_types(outputs[0].dtype, torch.float32)
            prepared = self.terms.prepare(target, self.num_classes, dtype)
            student = outputs[0].to(dtype).flatten(2)
            with torch.no_grad():
                logits = self.mixers[teacher.name](
                    [resample(outputs[j].to(dtype), prepared.size) for j in teacher.scales]
                )
            divergence = sum(
                F.kl_div(s, t, reduction="none", log_target=True)
                for s, t in zip(
                    self.terms.log_probabilities(student), self.terms.log_probabilities(logits), strict=True
                )
            ).sum(1, keepdim=True)
            if prepared.valid is None:
                return divergence.mean()
            return (divergence * prepared.valid).sum() / prepared.valid.sum().clamp_min(1)
