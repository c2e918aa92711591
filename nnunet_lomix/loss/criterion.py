"""What a map costs: nnU-Net's criterion, cross-entropy plus Dice, as a function of a few sums over pixels.

A map enters its loss only through the sum of the cross-entropy and, for each sample and class, the intersection
with the target and the volume of the prediction. So a loss is computed in two steps: :meth:`Criterion.pixel_sums` takes
these sums over all pixels or some of them, and :meth:`Criterion.losses` makes the losses of all maps of them and of the
sums over the target, :meth:`Criterion.target_sums`.
:meth:`Criterion.pixel_sums_vjp` goes back from the sums to the logits. Values and gradients are those of nnU-Net's
``DC_and_CE_loss`` (plain classes) and ``DC_and_BCE_loss`` (regions), with ``MemoryEfficientSoftDiceLoss``, in nnU-Net
2.8.1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

WHOLE = slice(None)


class Target(NamedTuple):
    """A prepared target; B samples, C classes or regions, N pixels.

    Attributes:
        size: the spatial shape, whose product is N.
        num_classes: C.
        dtype: that of the logits.
        values: ``(B, 1, N)``, int64 labels, 0 in ignored pixels; or ``(B, C, N)``, regions of 0 and 1.
        valid: ``(B, 1, N)`` of 0 and 1, or None if every pixel is valid.
    """

    size: torch.Size
    num_classes: int
    dtype: torch.dtype
    values: Tensor
    valid: Tensor | None


class TargetPart(NamedTuple):
    """The target in some pixels of some samples; b samples, n pixels.

    Attributes:
        labels: ``(b, 1, n)``, as in :class:`Target`; None for regions.
        y: ``(b, C, n)`` of 0 and 1: one-hot classes, or regions; 0 in ignored pixels.
        valid: ``(b, 1, n)`` of 0 and 1, or None if every pixel is valid.
    """

    labels: Tensor | None
    y: Tensor
    valid: Tensor | None

    def piece(self, sample: int, pixels: slice) -> "TargetPart":
        """The target in some pixels of one sample; b = 1."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[sample : sample + 1, :, pixels]

        labels = None if self.labels is None else cut(self.labels)
        return TargetPart(labels, cut(self.y), None if self.valid is None else cut(self.valid))


class PixelSums(NamedTuple):
    """Sums over pixels of one map, or of M maps with a leading axis; or the gradient of a loss by these sums.

    Attributes:
        cross_entropy: sum over all valid pixels of all samples, ``()`` or ``(M,)``.
        intersection: Σ p·y for each sample and class, ``(B, C)`` or ``(M, B, C)``.
        volume: Σ p for each sample and class, ``(B, C)`` or ``(M, B, C)``.
    """

    cross_entropy: Tensor
    intersection: Tensor
    volume: Tensor

    @classmethod
    def zeros(cls, num_maps: int, z: Tensor) -> "PixelSums":
        """Sums to add to, for logits like ``z``, ``(B, C, …)``."""
        batch, classes = z.shape[:2]
        per_class = (num_maps, batch, classes)
        return cls(z.new_zeros(num_maps), z.new_zeros(per_class), z.new_zeros(per_class))

    @classmethod
    def stack(cls, sums: "Sequence[PixelSums]") -> "PixelSums":
        """Put the sums of M single maps together."""
        return cls(*(torch.stack(parts) for parts in zip(*sums, strict=True)))

    @classmethod
    def cat(cls, sums: "Sequence[PixelSums]") -> "PixelSums":
        """Put the sums of several groups of maps together."""
        return cls(*(torch.cat(parts) for parts in zip(*sums, strict=True)))

    def split(self, sizes: list[int]) -> "list[PixelSums]":
        """Take the sums of M maps apart into groups of neighbouring maps of these sizes."""
        return [PixelSums(*group) for group in zip(*(s.split(sizes) for s in self), strict=True)]

    def select_maps(self, numbers: Tensor) -> "PixelSums":
        """The sums of the maps with these numbers, in this order."""
        return PixelSums(*(s[numbers] for s in self))

    def select_samples(self, samples: slice) -> "PixelSums":
        """Intersections and volumes of these samples; the cross-entropy, a sum over all samples, stays as it is."""
        return PixelSums(self.cross_entropy, self.intersection[:, samples], self.volume[:, samples])

    def add(self, other: "PixelSums", samples: slice) -> None:
        """Add the sums over some pixels of these samples, in place."""
        self.cross_entropy.add_(other.cross_entropy)
        self.intersection[:, samples] += other.intersection
        self.volume[:, samples] += other.volume


class TargetSums(NamedTuple):
    """Sums over the pixels of the target.

    Attributes:
        pixels: scalar, number of valid pixels of all samples.
        volume: ``(B, C)``, number of valid pixels of each class or region.
    """

    pixels: Tensor
    volume: Tensor


class SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks; its gradient is summed too, since every rank computes the loss from it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> Tensor:
        total = grad_total.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class Criterion:
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

    def __init__(
        self,
        weight_ce: float = 1.0,
        weight_dice: float = 1.0,
        batch_dice: bool = False,
        smooth: float = 1e-5,
        ddp: bool = False,
    ):
        self.weight_ce = weight_ce
        self.weight_dice = weight_dice
        self.batch_dice = batch_dice
        self.smooth = smooth
        self.ddp = ddp

    @property
    def minimum(self) -> float:
        """The lowest value a loss can take: Dice enters as −Dice, as in nnU-Net."""
        return -self.weight_dice

    def target_channels(self, num_classes: int) -> int:
        """Channels of the target."""
        raise NotImplementedError

    def check_values(self, target: Tensor, num_classes: int) -> None:
        """Look at every value of a target; the host waits for the device.

        Raises:
            ValueError: a value is no label, or no 0 or 1 of a region.
        """
        raise NotImplementedError

    def prepare(self, target: Tensor, num_classes: int, dtype: torch.dtype) -> Target:
        """Prepare the full-resolution target for all maps; ``dtype`` is that of the logits."""
        raise NotImplementedError

    def part(self, target: Target, samples: slice = WHOLE, pixels: slice = WHOLE) -> TargetPart:
        """The target in some samples and pixels."""
        raise NotImplementedError

    def pixel_sums(self, logits: Tensor, part: TargetPart) -> PixelSums:
        """Sums over pixels of one map, logits ``(b, C, n)``, or of several with a leading axis; differentiable."""
        raise NotImplementedError

    def pixel_sums_vjp(self, logits: Tensor, part: TargetPart, grad_sums: PixelSums) -> Tensor:
        """The gradient by the logits of :meth:`pixel_sums`, like them, from the gradient by the sums."""
        raise NotImplementedError

    def target_sums(self, target: Target) -> TargetSums:
        """Sums over all pixels of the target."""
        raise NotImplementedError

    def cross_entropy_terms(self, sums: TargetSums) -> Tensor:
        """Scalar, what the sum of the cross-entropy is divided by; 1 without any pixel, where the sum, too, is 0."""
        return sums.pixels.clamp_min(1)

    def losses(self, sums: PixelSums, target: TargetSums) -> Tensor:
        """Losses ``(M,)`` of M maps from their sums and those of the target."""
        cross_entropy = sums.cross_entropy / self.cross_entropy_terms(target)
        intersection, volume = sums.intersection, sums.volume
        target_volume = target.volume.expand_as(volume)
        if self.batch_dice:
            batch_sums = torch.stack([intersection, volume, target_volume]).sum(2, keepdim=True)
            intersection, volume, target_volume = SumOverRanks.apply(batch_sums) if self.ddp else batch_sums
        dice = (2 * intersection + self.smooth) / (volume + target_volume + self.smooth).clamp_min(1e-8)
        return self.weight_ce * cross_entropy - self.weight_dice * dice[..., self.first_class :].mean((1, 2))


class ClassCriterion(Criterion):
    """Softmax over classes: cross-entropy, and Dice without the background, class 0.

    The target is ``(B, 1, *spatial)``, integer valued; pixels of ``ignore_label`` count in neither term.
    """

    first_class = 1

    def __init__(self, ignore_label: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.ignore_label = ignore_label
        self.ignores = ignore_label is not None

    def target_channels(self, num_classes: int) -> int:
        return 1

    def check_values(self, target: Tensor, num_classes: int) -> None:
        if target.is_floating_point():
            known = (target >= 0) & (target < num_classes) & (target == target.round())
        else:
            target = target.long()  # PyTorch compares no uint16
            known = (target >= 0) & (target < num_classes)
        if self.ignore_label is not None:
            known |= target == self.ignore_label
        if not known.all():
            raise ValueError(
                f"the target has the label {target[~known][0].item():g}, but the {num_classes} classes are 0 to "
                f"{num_classes - 1}; is it the ignore_label, or are these regions?"
            )

    def prepare(self, target: Tensor, num_classes: int, dtype: torch.dtype) -> Target:
        labels = target.flatten(2).long()
        valid = None
        if self.ignore_label is not None:
            counts = torch.ne(labels, self.ignore_label)
            valid, labels = counts.to(dtype), labels.where(counts, 0)
        return Target(target.shape[2:], num_classes, dtype, labels, valid)

    def target_sums(self, target: Target) -> TargetSums:
        labels, valid = target.values, target.valid
        classes = range(target.num_classes)
        counted = [(labels == c) if valid is None else (labels == c) & valid.bool() for c in classes]
        return TargetSums(_count_pixels(target), torch.cat([pixels.sum(2) for pixels in counted], 1).to(target.dtype))

    def part(self, target: Target, samples: slice = WHOLE, pixels: slice = WHOLE) -> TargetPart:
        labels = target.values[samples, :, pixels]
        valid = None if target.valid is None else target.valid[samples, :, pixels]
        y = labels.new_zeros(len(labels), target.num_classes, labels.shape[2], dtype=target.dtype)
        return TargetPart(labels, y.scatter_(1, labels, 1 if valid is None else valid), valid)

    def pixel_sums(self, logits: Tensor, part: TargetPart) -> PixelSums:
        if logits.requires_grad:
            log_p = logits.log_softmax(-2)
            p, log_p_of_true_class = log_p.exp(), _of_true_class(log_p, part)
        else:  # one exponential of each value, not two: log p − log max p = z − max z
            p = logits.softmax(-2)
            log_p_of_true_class = _of_true_class(logits, part) - logits.amax(-2) + p.amax(-2).log()
        # sums over pixels, not a matrix product: that adds pixel by pixel, and loses a percent of a large image
        intersection = (p * part.y).sum(-1)
        if part.valid is not None:
            log_p_of_true_class, p = log_p_of_true_class * part.valid[:, 0], p * part.valid
        return PixelSums(-log_p_of_true_class.sum((-2, -1)), intersection, p.sum(-1))

    def pixel_sums_vjp(self, logits: Tensor, part: TargetPart, grad_sums: PixelSums) -> Tensor:
        # With a = ∂/∂p of the Dice part, a_c = grad volume_c + [c is true] · grad intersection_c, the derivative by the
        # logits is p (a − Σ a p) for it, and p · valid − y for the cross-entropy. What is the same in all channels is
        # taken together as a vector of pixels, and what is in the true channel only, too.
        p = logits.softmax(-2)
        grad_true_class = (
            _sum_over_classes(grad_sums.intersection, p * part.y) - grad_sums.cross_entropy[..., None, None]
        )
        common = _sum_over_classes(grad_sums.volume, p) + grad_true_class
        grad_logits = p.mul_(grad_sums.volume[..., None] - common[..., None, :])
        if part.valid is not None:
            grad_logits.mul_(part.valid)
        return grad_logits.addcmul_(grad_true_class[..., None, :], part.y)


def _of_true_class(values: Tensor, part: TargetPart) -> Tensor:
    """Of values ``(…, b, C, n)`` that of each pixel's true class, ``(…, b, n)``; 0 in ignored pixels."""
    return (values * part.y).sum(-2)


def _sum_over_classes(weights: Tensor, values: Tensor) -> Tensor:
    """Σ over classes of weights ``(…, b, C)`` times values ``(…, b, C, n)``: ``(…, b, n)``."""
    return (weights[..., None, :] @ values)[..., 0, :]


class RegionCriterion(Criterion):
    """A sigmoid for each region: binary cross-entropy, and Dice of every region.

    The target is ``(B, C, *spatial)`` of 0 and 1, or bool; with ``ignore_channel`` it has one channel more, the
    last, which is 1 where a pixel counts in neither term. As in nnU-Net the binary cross-entropy is a mean over pixels
    and regions without, and a mean over pixels of the sum over regions with an ignore channel.
    """

    def __init__(self, ignore_channel: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.ignores = ignore_channel

    def target_channels(self, num_classes: int) -> int:
        return num_classes + self.ignores

    def check_values(self, target: Tensor, num_classes: int) -> None:
        target = target if target.is_floating_point() else target.long()
        known = (target == 0) | (target == 1)
        if not known.all():
            raise ValueError(
                f"the target has the value {target[~known][0].item():g}, but regions are 0 or 1; are these labels, or "
                "does a mask of 0 and 255 have to be divided?"
            )

    def prepare(self, target: Tensor, num_classes: int, dtype: torch.dtype) -> Target:
        regions = target.flatten(2).to(dtype)
        valid = None
        if self.ignores:
            valid = 1 - regions[:, -1:]
            regions = regions[:, :-1] * valid
        return Target(target.shape[2:], num_classes, dtype, regions, valid)

    def target_sums(self, target: Target) -> TargetSums:
        return TargetSums(_count_pixels(target), target.values.sum(2))

    def cross_entropy_terms(self, sums: TargetSums) -> Tensor:
        terms = super().cross_entropy_terms(sums)
        return terms if self.ignores else terms * sums.volume.shape[1]

    def part(self, target: Target, samples: slice = WHOLE, pixels: slice = WHOLE) -> TargetPart:
        valid = None if target.valid is None else target.valid[samples, :, pixels]
        return TargetPart(None, target.values[samples, :, pixels], valid)

    def pixel_sums(self, logits: Tensor, part: TargetPart) -> PixelSums:
        p = logits.sigmoid()
        if logits.requires_grad:
            cross_entropy = F.binary_cross_entropy_with_logits(logits, part.y.expand_as(logits), reduction="none")
        else:  # log(1 + exp z) = max(z, 0) − log p(|z|), without the logarithm of 1 + x, which takes nine times as long
            cross_entropy = logits.clamp_min(0) - logits * part.y - torch.maximum(p, 1 - p).log()
        if part.valid is not None:
            cross_entropy, p = cross_entropy * part.valid, p * part.valid
        return PixelSums(cross_entropy.sum((-3, -2, -1)), (p * part.y).sum(-1), p.sum(-1))

    def pixel_sums_vjp(self, logits: Tensor, part: TargetPart, grad_sums: PixelSums) -> Tensor:
        p = logits.sigmoid()
        grad_logits = torch.addcmul(grad_sums.volume[..., None], grad_sums.intersection[..., None], part.y)
        grad_logits *= p * (1 - p)
        grad_logits.addcmul_(p - part.y, grad_sums.cross_entropy[..., None, None, None])
        return grad_logits if part.valid is None else grad_logits.mul_(part.valid)


def _count_pixels(target: Target) -> Tensor:
    """Scalar, the number of valid pixels of all samples."""
    if target.valid is None:
        batch, _, pixels = target.values.shape
        return target.values.new_full((), batch * pixels, dtype=target.dtype)
    return target.valid.sum()
