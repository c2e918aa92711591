"""What a map costs: nnU-Net's criterion, cross-entropy plus Dice, as a function of a few sums over pixels.

A map enters its loss only through the sum of the cross-entropy and, for each sample and class, the intersection
with the target and the volume of the prediction. So a loss is computed in two steps: :meth:`Criterion.pixel_sums` takes
these sums over some pixels, :meth:`Criterion.losses` makes the losses of all maps of them and of the target. Values and
gradients are those of nnU-Net's ``DC_and_CE_loss`` (plain classes) and ``DC_and_BCE_loss`` (regions), with
``MemoryEfficientSoftDiceLoss``, in nnU-Net 2.8.1.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from nnunet_lomix.loss.grid import divide


class Target(NamedTuple):
    """A prepared target; B samples, C classes or regions, N pixels.

    Attributes:
        labels: ``(B, 1, N)``, int64, 0 in ignored pixels; None for regions.
        y: ``(B, C, N)`` of 0 and 1: one-hot classes or regions, 0 in ignored pixels.
        valid: ``(B, 1, N)`` of 0 and 1, or None if every pixel is valid.
    """

    labels: Tensor | None
    y: Tensor
    valid: Tensor | None

    def divide(self, pixels: int) -> "list[Target]":
        """The target in parts of so many pixels."""
        y = divide(self.y, pixels, 2)
        labels, valid = ([None] * len(y) if t is None else divide(t, pixels, 2) for t in (self.labels, self.valid))
        return [Target(*part) for part in zip(labels, y, valid, strict=True)]


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
        paper_dice: the Dice is that of the authors' code, (2 Σ p·y + smooth) / (Σ p² + Σ y² + smooth) of the whole
            batch, mean over all classes with the background.
    """

    first_class = 0  # of those that nnU-Net's Dice counts
    ignores: bool  # whether some pixels may count in neither term

    def __init__(
        self,
        weight_ce: float = 1.0,
        weight_dice: float = 1.0,
        batch_dice: bool = False,
        smooth: float = 1e-5,
        ddp: bool = False,
        paper_dice: bool = False,
    ):
        self.weight_ce = weight_ce
        self.weight_dice = weight_dice
        self.batch_dice = batch_dice or paper_dice
        self.paper_dice = paper_dice
        self.smooth = smooth
        self.ddp = ddp

    @property
    def minimum(self) -> float:
        """The lowest value a loss can take: Dice enters as −Dice, as in nnU-Net."""
        return -self.weight_dice

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of one map, a scalar; logits ``(B, C, *spatial)``, and the target of the same size."""
        prepared = self.prepare(target, logits.shape[1], logits.dtype)
        return self.losses(self.pixel_sums(logits.flatten(2), prepared)[None], prepared)[0]

    def target_channels(self, num_classes: int) -> int:
        """Channels of the target."""
        raise NotImplementedError

    def check_values(self, target: Tensor, num_classes: int) -> None:
        """Look at every value of a target; the host waits for the device.

        Raises:
            ValueError: a value is no label, or no 0 or 1 of a region.
        """
        raise NotImplementedError

    def prepare(self, target: Tensor, num_classes: int, dtype: torch.dtype, inside: Tensor | None = None) -> Target:
        """Prepare a target for maps of its size.

        Args:
            target: ``(B, channels, *spatial)``.
            dtype: of the logits.
            inside: ``(1, 1, *spatial)`` of 0 and 1, the pixels that count; None for all.
        """
        raise NotImplementedError

    def pixel_sums(self, logits: Tensor, target: Target) -> Tensor:
        """Sums over the pixels of one map, logits ``(B, C, N)``, as ``(B, 1 + 2 C)``.

        For each sample the sum of the cross-entropy, the intersections Σ p·y and the volumes Σ p (Σ p² with
        ``paper_dice``) of all classes.
        """
        cross_entropy, p = self._entropy_and_probabilities(logits, target)
        intersection = (p * target.y).sum(2)  # no matrix product, which adds pixel by pixel and loses a percent
        if target.valid is not None:
            cross_entropy, p = cross_entropy * target.valid, p * target.valid
        volume = (p * p if self.paper_dice else p).sum(2)
        return torch.cat([cross_entropy.sum((1, 2))[:, None], intersection, volume], 1)

    def _entropy_and_probabilities(self, logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each pixel, ``(B, 1, N)`` or ``(B, C, N)``, and p, ``(B, C, N)``."""
        raise NotImplementedError

    def losses(self, sums: Tensor, target: Target) -> Tensor:
        """Losses ``(M,)`` of M maps from their sums over all pixels of the target, ``(M, B, 1 + 2 C)``."""
        batch, classes, pixels = target.y.shape
        ignored = 0 if self.paper_dice else self.first_class
        counted = classes - ignored
        cross_entropy, _, intersection, _, volume = sums.split([1, ignored, counted, ignored, counted], 2)
        true_volume = target.y[:, ignored:].sum(2)
        if self.batch_dice:
            intersection, volume, true_volume = (s.sum(-2, keepdim=True) for s in (intersection, volume, true_volume))
            if self.ddp:
                everything = [intersection, volume, true_volume.expand_as(volume)]
                intersection, volume, true_volume = SumOverRanks.apply(torch.stack(everything))
        # nnU-Net clamps the whole denominator: the same, unless smooth is 0 and the target is empty
        true_volume = (true_volume + self.smooth).clamp_min(1e-8)
        half_dice = (intersection + self.smooth / 2) / (volume + true_volume)
        terms = batch * pixels if target.valid is None else target.valid.sum().clamp_min(1)
        cross_entropy = cross_entropy.sum((1, 2)) * (self.weight_ce / (terms * self.terms_of_pixel(classes)))
        return torch.sub(cross_entropy, half_dice.mean((1, 2)), alpha=2 * self.weight_dice)

    def terms_of_pixel(self, num_classes: int) -> int:
        """How many terms of a pixel the cross-entropy is the mean of."""
        return 1


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

    def prepare(self, target: Tensor, num_classes: int, dtype: torch.dtype, inside: Tensor | None = None) -> Target:
        labels = target.flatten(2).long()
        valid = None if inside is None else inside.flatten(2).to(dtype).expand(labels.shape)
        if self.ignore_label is not None:
            counts = torch.ne(labels, self.ignore_label)
            valid = counts.to(dtype) if valid is None else counts * valid
            labels = labels.where(counts, 0)
        y = labels.new_zeros(len(labels), num_classes, labels.shape[2], dtype=dtype)
        return Target(labels, y.scatter_(1, labels, 1 if valid is None else valid), valid)

    def _entropy_and_probabilities(self, logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        assert target.labels is not None
        log_p = logits.log_softmax(1)
        return -log_p.gather(1, target.labels), log_p.exp()


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

    def prepare(self, target: Tensor, num_classes: int, dtype: torch.dtype, inside: Tensor | None = None) -> Target:
        regions = target.flatten(2).to(dtype)
        valid = None if inside is None else inside.flatten(2).to(dtype).expand_as(regions[:, :1])
        if self.ignores:
            regions, ignored = regions[:, :-1], regions[:, -1:]
            valid = 1 - ignored if valid is None else (1 - ignored) * valid
        regions = regions if valid is None else regions * valid
        return Target(None, regions, valid)

    def terms_of_pixel(self, num_classes: int) -> int:
        return 1 if self.ignores else num_classes

    def _entropy_and_probabilities(self, logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        return F.binary_cross_entropy_with_logits(logits, target.y, reduction="none"), logits.sigmoid()


def make_criterion(regions: bool, ignore_label: int | None, **terms: Any) -> Criterion:
    """The criterion for a kind of target; ``ignore_label`` as for :class:`~nnunet_lomix.loss.LoMixLoss`."""
    return RegionCriterion(ignore_label is not None, **terms) if regions else ClassCriterion(ignore_label, **terms)


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast is off, on devices that have autocast at all."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
