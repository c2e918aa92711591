"""What a map costs: nnU-Net's loss, cross-entropy plus Dice, as a function of a few sums over pixels.

A map enters its loss only through the sum of the cross-entropy and, for each sample and class, the intersection
with the target and the volume of the prediction. :meth:`Terms.statistics` takes these sums, :meth:`Terms.losses`
makes the losses of all maps from them. The values and gradients are those of nnU-Net's ``DC_and_CE_loss`` (plain
classes) and ``DC_and_BCE_loss`` (regions), with ``MemoryEfficientSoftDiceLoss``, as of nnU-Net 2.8.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F


@dataclass
class Target:
    """A prepared target; B samples, C classes or regions, N pixels.

    Attributes:
        size: the spatial shape, whose product is N.
        truth: y, ``(B, C, N)`` of 0 and 1: one-hot classes, or regions; 0 in ignored pixels.
        valid: ``(B, 1, N)`` of 0 and 1, or None if every pixel is valid.
        cross_entropy_terms: scalar, what the sum of the cross-entropy is divided by.
        volume: ``(B, C)``, pixels of each class or region.
    """

    size: torch.Size
    truth: Tensor
    valid: Tensor | None
    cross_entropy_terms: Tensor
    volume: Tensor


@dataclass
class Statistics:
    """Sums over pixels of one map, or of M maps with a leading axis.

    Attributes:
        cross_entropy: sum over all valid pixels of all samples, ``()`` or ``(M,)``.
        intersection: Σ p·y for each sample and class, ``(B, C)`` or ``(M, B, C)``.
        volume: Σ p for each sample and class, ``(B, C)`` or ``(M, B, C)``.
    """

    cross_entropy: Tensor
    intersection: Tensor
    volume: Tensor

    @classmethod
    def stack(cls, of_maps: "Sequence[Statistics]") -> "Statistics":
        return cls(*(torch.stack([getattr(s, field) for s in of_maps]) for field in cls.__dataclass_fields__))


class SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks; its gradient is summed too, since every rank computes the loss from it."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class Terms:
    """Cross-entropy plus soft Dice; the subclasses say for which kind of target.

    Args:
        weight_ce, weight_dice: factors of the two terms.
        batch_dice: one Dice for the whole batch instead of one for each sample; under ``ddp`` for the whole batch of
            all ranks.
        smooth: added to numerator and denominator of the Dice.
        ddp: the batch is spread over the ranks of ``torch.distributed``.
    """

    first_class = 0  # of those that the Dice counts

    def __init__(self, weight_ce=1.0, weight_dice=1.0, batch_dice=False, smooth=1e-5, ddp=False):
        self.weight_ce = weight_ce
        self.weight_dice = weight_dice
        self.batch_dice = batch_dice
        self.smooth = smooth
        self.ddp = ddp

    @property
    def minimum(self) -> float:
        """The lowest value a loss can take: Dice enters as −Dice, as in nnU-Net."""
        return -self.weight_dice

    def channels(self, num_classes: int) -> int:
        """Channels of the target."""
        raise NotImplementedError

    def prepare(self, target: Tensor, num_classes: int, dtype: torch.dtype) -> Target:
        """Prepare the full-resolution target for all maps; ``dtype`` is that of the logits."""
        raise NotImplementedError

    def statistics(self, logits: Tensor, target: Target) -> Statistics:
        """Sums over pixels of one map, logits ``(B, C, N)``."""
        raise NotImplementedError

    def log_probabilities(self, logits: Tensor) -> tuple[Tensor, ...]:
        """log p of each value that a pixel's variables can take, tensors like ``logits``, ``(B, C, N)``."""
        raise NotImplementedError

    def losses(self, statistics: Statistics, target: Target) -> Tensor:
        """Losses ``(M,)`` of M maps from their statistics."""
        cross_entropy = statistics.cross_entropy / target.cross_entropy_terms
        intersection, volume = statistics.intersection, statistics.volume
        target_volume = target.volume.expand_as(volume)
        if self.batch_dice:
            sums = torch.stack([intersection, volume, target_volume]).sum(2, keepdim=True)
            intersection, volume, target_volume = SumOverRanks.apply(sums) if self.ddp else sums
        dice = (2 * intersection + self.smooth) / (volume + target_volume + self.smooth).clamp_min(1e-8)
        return self.weight_ce * cross_entropy - self.weight_dice * dice[..., self.first_class :].mean((1, 2))


class ClassTerms(Terms):
    """Softmax over classes: cross-entropy, and Dice without the background, class 0.

    The target is ``(B, 1, *spatial)``, integer valued; pixels of ``ignore_label`` count in neither term.
    """

    first_class = 1

    def __init__(self, ignore_label: int | None = None, **kwargs):
        super().__init__(**kwargs)
        self.ignore_label = ignore_label

    def channels(self, num_classes):
        return 1

    def prepare(self, target, num_classes, dtype):
        labels = target.flatten(2).long()
        valid = None
        if self.ignore_label is not None:
            valid = (labels != self.ignore_label).to(dtype)
            labels = labels.where(valid.bool(), 0)
        # one-hot and sums: scatter_add of the probabilities adds pixel by pixel, and loses a percent of a large image
        truth = torch.zeros(len(labels), num_classes, labels.shape[2], dtype=dtype, device=labels.device)
        truth.scatter_(1, labels, 1 if valid is None else valid)
        return Target(target.shape[2:], truth, valid, count(labels, valid), truth.sum(2))

    def log_probabilities(self, logits):
        return (logits.log_softmax(1),)

    def statistics(self, logits, target):
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        if target.valid is not None:
            p = p * target.valid
        return Statistics(-(log_p * target.truth).sum(), (p * target.truth).sum(2), p.sum(2))


class RegionTerms(Terms):
    """A sigmoid for each region: binary cross-entropy, and Dice of every region.

    The target is ``(B, C, *spatial)`` of 0 and 1, or bool; with ``ignore_channel`` it has one channel more, the
    last, which is 1 where a pixel counts in neither term. As in nnU-Net the binary cross-entropy is a mean over pixels
    and regions without, and a mean over pixels of the sum over regions with an ignore channel.
    """

    def __init__(self, ignore_channel: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.ignore_channel = ignore_channel

    def channels(self, num_classes):
        return num_classes + self.ignore_channel

    def prepare(self, target, num_classes, dtype):
        truth = target.flatten(2).to(dtype)
        if not self.ignore_channel:
            return Target(target.shape[2:], truth, None, count(truth, None), truth.sum(2))
        valid = 1 - truth[:, -1:]
        truth = truth[:, :-1] * valid
        return Target(target.shape[2:], truth, valid, count(truth, valid), truth.sum(2))

    def log_probabilities(self, logits):
        return F.logsigmoid(logits), F.logsigmoid(-logits)

    def statistics(self, logits, target):
        p = logits.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(logits, target.truth, reduction="none")
        if target.valid is not None:
            cross_entropy, p = cross_entropy * target.valid, p * target.valid
        return Statistics(cross_entropy.sum(), (p * target.truth).sum(2), p.sum(2))


def count(values: Tensor, valid: Tensor | None) -> Tensor:
    """What a mean divides by: the number of values, or of valid pixels; 1 without any, where the sum, too, is 0."""
    if valid is None:
        return torch.tensor(float(values.numel()), device=values.device)
    return valid.sum().clamp_min(1)
