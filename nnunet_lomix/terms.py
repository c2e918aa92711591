"""What a map costs: nnU-Net's loss, cross-entropy plus Dice, as a function of a few sums over pixels.

A map enters its loss only through the sum of the cross-entropy and, for each sample and class, the intersection
with the target and the volume of the prediction. :meth:`Terms.statistics` takes these sums, over all pixels or some of
them, :meth:`Terms.losses` makes the losses of all maps from them, and :meth:`Terms.gradient` goes back from the
statistics to the logits. The values and gradients are those of nnU-Net's ``DC_and_CE_loss`` (plain
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
        values: ``(B, 1, N)``, int64 labels, 0 in ignored pixels; or ``(B, C, N)``, regions of 0 and 1.
        valid: ``(B, 1, N)`` of 0 and 1, or None if every pixel is valid.
        cross_entropy_terms: scalar, what the sum of the cross-entropy is divided by.
        volume: ``(B, C)``, valid pixels of each class or region.
    """

    size: torch.Size
    values: Tensor
    valid: Tensor | None
    cross_entropy_terms: Tensor
    volume: Tensor


@dataclass
class Truth:
    """What is true in some pixels of some samples; b samples, n pixels.

    Attributes:
        labels: ``(b, 1, n)``, as in :class:`Target`; None for regions.
        y: ``(b, C, n)`` of 0 and 1: one-hot classes, or regions; 0 in ignored pixels.
        valid: ``(b, 1, n)`` of 0 and 1, or None if every pixel is valid.
    """

    labels: Tensor | None
    y: Tensor
    valid: Tensor | None

    def part(self, sample: int, pixels: slice) -> "Truth":
        """What is true in some pixels of one sample; b = 1."""
        tensors = (self.labels, self.y, self.valid)
        return Truth(*(None if t is None else t[sample : sample + 1, :, pixels] for t in tensors))


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
    def zeros(cls, num_maps: int, z: Tensor) -> "Statistics":
        """Sums to add to, for logits like ``z``, ``(B, C, …)``."""
        return cls(z.new_zeros(num_maps), *(z.new_zeros(num_maps, *z.shape[:2]) for _ in range(2)))

    def part(self, maps: Tensor, sample: int) -> "Statistics":
        """Those of some maps, given by their numbers, and of one sample; ``B`` is 1."""
        return Statistics(
            self.cross_entropy[maps], *(t[maps, sample][:, None] for t in (self.intersection, self.volume))
        )

    def split(self, sizes: list[int]) -> "list[Statistics]":
        """Those of the first maps, of the next ones, …"""
        return [Statistics(*of_maps) for of_maps in zip(*(t.split(sizes) for t in vars(self).values()), strict=True)]

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


WHOLE = slice(None)


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
    ignores: bool  # whether some pixels may count in neither term

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

    def truth(self, target: Target, samples: slice = WHOLE, pixels: slice = WHOLE) -> Truth:
        """What is true in a part of the target."""
        raise NotImplementedError

    def statistics(self, logits: Tensor, truth: Truth) -> Statistics:
        """Sums over pixels of one map, logits ``(b, C, n)``, or of several with a leading axis; differentiable."""
        raise NotImplementedError

    def gradient(self, logits: Tensor, truth: Truth, by: Statistics) -> Tensor:
        """Derivative by the logits, as in :meth:`statistics`, where ``by`` are the derivatives by the statistics."""
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
        self.ignores = ignore_label is not None

    def channels(self, num_classes):
        return 1

    def prepare(self, target, num_classes, dtype):
        labels = target.flatten(2).long()
        valid = None
        if self.ignores:
            valid = (labels != self.ignore_label).to(dtype)
            labels = labels.where(valid.bool(), 0)
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(labels, num_classes)
        counted = [(labels == c) if valid is None else (labels == c) & valid.bool() for c in range(num_classes)]
        volume = torch.cat([pixels.sum(2) for pixels in counted], 1).to(dtype)
        return Target(target.shape[2:], labels, valid, count(labels, valid), volume)

    def truth(self, target, samples=WHOLE, pixels=WHOLE):
        labels = target.values[samples, :, pixels]
        valid = None if target.valid is None else target.valid[samples, :, pixels]
        y = target.volume.new_zeros(len(labels), target.volume.shape[1], labels.shape[2])
        return Truth(labels, y.scatter_(1, labels, 1 if valid is None else valid), valid)

    def log_probabilities(self, logits):
        return (logits.log_softmax(1),)

    def statistics(self, logits, truth):
        if logits.requires_grad:
            log_p = logits.log_softmax(-2)
            p, log_p_of_truth = log_p.exp(), at_truth(log_p, truth)
        else:  # one exponential of each value, not two: log p − log max p = z − max z
            p = logits.softmax(-2)
            log_p_of_truth = at_truth(logits, truth) - logits.amax(-2) + p.amax(-2).log()
        # sums over pixels, not a matrix product: that adds pixel by pixel, and loses a percent of a large image
        intersection = (p * truth.y).sum(-1)
        if truth.valid is not None:
            log_p_of_truth, p = log_p_of_truth * truth.valid[:, 0], p * truth.valid
        return Statistics(-log_p_of_truth.sum((-2, -1)), intersection, p.sum(-1))

    def gradient(self, logits, truth, by):
        # With a = ∂/∂p of the Dice part, a_c = volume_c + [c is true] intersection_c, the derivative by the logits is
        # p (a − Σ a p) for it, and p valid − y for the cross-entropy. What is the same in all channels is taken
        # together as a vector of pixels, and what is in the true channel only, too.
        p = logits.softmax(-2)
        of_truth = weigh_classes(by.intersection, p * truth.y) - by.cross_entropy[..., None, None]
        common = weigh_classes(by.volume, p) + of_truth
        gradient = p.mul_(by.volume[..., None] - common[..., None, :])
        if truth.valid is not None:
            gradient.mul_(truth.valid)
        return gradient.addcmul_(of_truth[..., None, :], truth.y)


def check_labels(labels: Tensor, num_classes: int):
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"the target has the label {wrong[0].item()}, but the {num_classes} classes are 0 to {num_classes - 1}; "
            "is it the ignore_label, or are these regions?"
        )


def at_truth(values: Tensor, truth: Truth) -> Tensor:
    """Of values ``(…, b, C, n)`` that of each pixel's true class, ``(…, b, n)``; 0 in ignored pixels."""
    return (values * truth.y).sum(-2)


def weigh_classes(weights: Tensor, values: Tensor) -> Tensor:
    """Σ over classes of weights ``(…, b, C)`` times values ``(…, b, C, n)``: ``(…, b, n)``."""
    if torch.compiler.is_compiling():  # one pass with what surrounds it, which a matrix product isn't
        return (weights[..., None] * values).sum(-2)
    return (weights[..., None, :] @ values)[..., 0, :]


class RegionTerms(Terms):
    """A sigmoid for each region: binary cross-entropy, and Dice of every region.

    The target is ``(B, C, *spatial)`` of 0 and 1, or bool; with ``ignore_channel`` it has one channel more, the
    last, which is 1 where a pixel counts in neither term. As in nnU-Net the binary cross-entropy is a mean over pixels
    and regions without, and a mean over pixels of the sum over regions with an ignore channel.
    """

    def __init__(self, ignore_channel: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.ignores = ignore_channel

    def channels(self, num_classes):
        return num_classes + self.ignores

    def prepare(self, target, num_classes, dtype):
        regions = target.flatten(2).to(dtype)
        valid = None
        if self.ignores:
            valid = 1 - regions[:, -1:]
            regions = regions[:, :-1] * valid
        return Target(target.shape[2:], regions, valid, count(regions, valid), regions.sum(2))

    def truth(self, target, samples=WHOLE, pixels=WHOLE):
        valid = None if target.valid is None else target.valid[samples, :, pixels]
        return Truth(None, target.values[samples, :, pixels], valid)

    def log_probabilities(self, logits):
        return F.logsigmoid(logits), F.logsigmoid(-logits)

    def statistics(self, logits, truth):
        p = logits.sigmoid()
        if logits.requires_grad:
            cross_entropy = F.binary_cross_entropy_with_logits(logits, truth.y.expand_as(logits), reduction="none")
        else:  # log(1 + exp z) = max(z, 0) − log p(|z|), without the logarithm of 1 + x, which takes nine times as long
            cross_entropy = logits.clamp_min(0) - logits * truth.y - torch.maximum(p, 1 - p).log()
        if truth.valid is not None:
            cross_entropy, p = cross_entropy * truth.valid, p * truth.valid
        return Statistics(cross_entropy.sum((-3, -2, -1)), (p * truth.y).sum(-1), p.sum(-1))

    def gradient(self, logits, truth, by):
        p = logits.sigmoid()
        gradient = torch.addcmul(by.volume[..., None], by.intersection[..., None], truth.y)
        gradient *= p * (1 - p)
        gradient.addcmul_(p - truth.y, by.cross_entropy[..., None, None, None])
        return gradient if truth.valid is None else gradient.mul_(truth.valid)


def count(values: Tensor, valid: Tensor | None) -> Tensor:
    """What a mean divides by: the number of values, or of valid pixels; 1 without any, where the sum, too, is 0."""
    if valid is None:
        return torch.tensor(float(values.numel()), device=values.device)
    return valid.sum().clamp_min(1)
