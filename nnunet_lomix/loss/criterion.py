"""What a map costs: nnU-Net's criterion, cross-entropy plus Dice, as a function of a few sums over pixels.

A map enters its loss only through the sum of the cross-entropy and, for each sample and class, the intersection
with the target and the volume of the prediction. So a loss is computed in two steps: :meth:`Criterion.pixel_sums` takes
these sums over some pixels, :meth:`Criterion.losses` makes the losses of all maps of them and of the target. Values and
gradients are those of nnU-Net's ``DC_and_CE_loss`` (plain classes) and ``DC_and_BCE_loss`` (regions), with
``MemoryEfficientSoftDiceLoss``, in nnU-Net 2.8.1.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass
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
        return SumOverRanks.forward(ctx, grad_total)


@dataclass
class Criterion:
    """Cross-entropy plus soft Dice, for one of two kinds of target.

    - Classes: softmax, and a Dice without the background, class 0. The target is ``(B, 1, *spatial)``, integer valued.
    - Regions: a sigmoid and a binary cross-entropy for each, and a Dice of every region. The target is
      ``(B, C, *spatial)`` of 0 and 1, or bool; with an ignore label it has one channel more, the last, of the pixels
      that count in neither term. As in nnU-Net the cross-entropy is a mean over pixels and regions, but with an ignore
      label a mean over pixels of the sum over regions.

    The arguments are those of :class:`~nnunet_lomix.loss.LoMixLoss`. ``paper_dice`` is
    (2 Σ p·y + smooth) / (Σ p² + Σ y² + smooth) of the whole batch, mean over all classes with the background.
    """

    regions: bool = False
    ignore_label: int | None = None
    _: KW_ONLY
    weight_ce: float = 1.0
    weight_dice: float = 1.0
    batch_dice: bool = False
    paper_dice: bool = False
    smooth: float = 1e-5
    ddp: bool = False

    def __post_init__(self) -> None:
        self.batch_dice |= self.paper_dice

    @property
    def ignores(self) -> bool:
        """Whether some pixels may count in neither term."""
        return self.ignore_label is not None

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
        return num_classes + self.ignores if self.regions else 1

    def check_values(self, target: Tensor, num_classes: int) -> None:
        """Look at every value of a target; the host waits for the device.

        Raises:
            ValueError: a value is no label, or no 0 or 1 of a region.
        """
        is_float = target.is_floating_point()
        target = target if is_float else target.long()  # PyTorch compares no uint16
        if self.regions:
            known = (target == 0) | (target == 1)
            expected = "regions are 0 or 1; are these labels, or does a mask of 0 and 255 have to be divided?"
        else:
            known = (target >= 0) & (target < num_classes)
            if is_float:
                known &= target == target.round()
            if self.ignores:
                known |= target == self.ignore_label
            classes = f"the {num_classes} classes are 0 to {num_classes - 1}"
            expected = f"{classes}; is it the ignore_label, or are these regions?"
        if not known.all():
            kind = "value" if self.regions else "label"
            raise ValueError(f"the target has the {kind} {target[~known][0].item():g}, but {expected}")

    def prepare(self, target: Tensor, num_classes: int, dtype: torch.dtype, inside: Tensor | None = None) -> Target:
        """A target for logits of its size and dtype; ``inside (1, 1, N)`` is 1 where pixels count, None for all."""
        target = target.flatten(2)
        valid = None if inside is None else inside.to(dtype).expand(len(target), -1, -1)
        if self.regions:
            y = target.to(dtype)
            if self.ignores:
                y, ignored = y[:, :-1], y[:, -1:]
                valid = 1 - ignored if valid is None else (1 - ignored) * valid
            return Target(None, y if valid is None else y * valid, valid)
        labels = target.long()
        if self.ignore_label is not None:
            counts = torch.ne(labels, self.ignore_label)
            valid = counts.to(dtype) if valid is None else counts * valid
            labels = labels.where(counts, 0)
        y = labels.new_zeros(len(labels), num_classes, labels.shape[2], dtype=dtype)
        return Target(labels, y.scatter_(1, labels, 1 if valid is None else valid), valid)

    def pixel_sums(self, logits: Tensor, target: Target) -> Tensor:
        """Sums over the pixels of one map, logits ``(B, C, N)``, as ``(B, 1 + 2 C)``.

        For each sample the sum of the cross-entropy, the intersections Σ p·y and the volumes Σ p (Σ p² with
        ``paper_dice``) of all classes.
        """
        if target.labels is None:
            cross_entropy = F.binary_cross_entropy_with_logits(logits, target.y, reduction="none")
            p = logits.sigmoid()
        else:
            log_p = logits.log_softmax(1)
            cross_entropy, p = -log_p.gather(1, target.labels), log_p.exp()
        intersection = (p * target.y).sum(2)  # no matrix product, which adds pixel by pixel and loses a percent
        if target.valid is not None:
            cross_entropy, p = cross_entropy * target.valid, p * target.valid
        volume = (p * p if self.paper_dice else p).sum(2)
        return torch.cat([cross_entropy.sum((1, 2))[:, None], intersection, volume], 1)

    def losses(self, sums: Tensor, target: Target) -> Tensor:
        """Losses ``(M,)`` of M maps from their sums over all pixels of the target, ``(M, B, 1 + 2 C)``."""
        batch, classes, pixels = target.y.shape
        ignored = 0 if self.regions or self.paper_dice else 1  # the background
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
        if self.regions and not self.ignores:
            terms = terms * classes
        cross_entropy = cross_entropy.sum((1, 2)) * (self.weight_ce / terms)
        return torch.sub(cross_entropy, half_dice.mean((1, 2)), alpha=2 * self.weight_dice)


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast is off, on devices that have autocast at all."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
