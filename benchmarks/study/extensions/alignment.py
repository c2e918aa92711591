"""Weights by how much the gradient of a map helps ``z_0``: measurement, rules, and the trainer that measures."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._dynamo import OptimizedModule

from extensions.moving_average import update_mean
from nnunet_lomix.loss import RULES, LoMixLoss, WeightingRule
from nnunet_lomix.loss.backends.base import full_precision
from nnunet_lomix.trainers import nnUNetTrainerLoMix

RELATIVE_STEP = 1e-3


def measure_alignment(
    network: nn.Module,
    loss: LoMixLoss,
    data: Tensor,
    target: Tensor,
    held_out: bool = False,
    step: float = RELATIVE_STEP,
) -> Tensor:
    """⟨u, ∇L_i⟩ for each map i, with u = ∇L_0 / ‖∇L_0‖ and gradients by the parameters of the network.

    Not one backward pass for each map: the scalar product is the derivative of L_i along u, and a central difference
    gives that of all maps at once, ``(L_i(φ + h u) − L_i(φ − h u)) / 2h``, with two forward passes.

    Args:
        network: gives the outputs that ``loss`` takes. Its parameters are moved and put back exactly, and so are the
            running statistics of its normalisation, if it has any.
        loss: the loss.
        data: a batch, ``(B, channels, *spatial)``.
        target: its target at full resolution, ``(B, 1, *spatial)`` of labels or ``(B, C, *spatial)`` of regions.
        held_out: ∇L_0 on every other sample of the batch, ∇L_i on those between, if there are two.
        step: length of h u, relative to the length of the parameters.

    Returns:
        ``(len(loss.maps),)``, detached; zero where ∇L_0 is zero or not finite.
    """
    # Every other sample, since nnU-Net puts the patches that surely have foreground at the end of a batch.
    apart = held_out and len(data) > 1
    first, second = (slice(0, None, 2), slice(1, None, 2)) if apart else (slice(None), slice(None))
    parameters = [p for p in network.parameters() if p.requires_grad]
    with full_precision(data.device.type), kept(list(network.buffers())):
        with torch.enable_grad():
            loss_of_z_0 = loss.losses(
                network(data[first]), target[first], torch.zeros(1, dtype=torch.long, device=data.device)
            )
            grads = torch.autograd.grad(loss_of_z_0, parameters, allow_unused=True)
        # Outputs other than z_0 have heads of their own, which the loss of z_0 doesn't depend on.
        pairs = [(p, grad) for p, grad in zip(parameters, grads, strict=True) if grad is not None]
        with torch.no_grad(), kept([p for p, _ in pairs]) as starts:
            length = norm([grad for _, grad in pairs])
            usable = length.isfinite() & (length > 0)
            h = step * norm(starts)
            losses = []
            for sign in (1, -1):
                for (p, grad), start in zip(pairs, starts, strict=True):
                    p.copy_(torch.where(usable, start + sign * h / length * grad, start))
                # Without a direction, too: under DDP the other ranks wait for the sums of this one.
                losses.append(loss.losses(network(data[second]), target[second]))
            after, before = losses
            return torch.where(usable, (after - before) / (2 * h), 0.0)


@contextmanager
def kept(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gives copies of the tensors; at the end of the block they have these values again, whatever has happened."""
    copies = [t.detach().clone() for t in tensors]
    try:
        yield copies
    finally:
        with torch.no_grad():
            for t, copy in zip(tensors, copies, strict=True):
                t.copy_(copy)


def norm(tensors: list[Tensor]) -> Tensor:
    """Length of all tensors taken as one vector, a scalar."""
    return torch.stack([t.norm() for t in tensors]).norm()


@RULES.register("alignment")
class Alignment(WeightingRule):
    """v_i = a_i / a_0, held between 0 and 1, with a_i = ⟨∇L_0, ∇L_i⟩ over the parameters of the network.

    The one-step look-ahead of architecture search (DARTS, arXiv 1806.09055) and of auxiliary tasks (Du et al.,
    arXiv 1812.02224; Auto-Lambda, arXiv 2202.03091): after a step −η Σ w_i ∇L_i the loss of ``z_0`` has changed by
    −η Σ w_i a_i, so a_i is what a unit of the weight of map i does for ``z_0``, and v_i compares it with what the
    weight would do on ``z_0`` itself. A map that works against ``z_0`` gets nothing. v_0 = 1. Where a_0 itself is not
    positive, which can only be noise, every map with a positive a_i counts fully.
    a is measured at every 10th step and averaged over about 100 steps; until then all maps are equal.

    Limits: it looks one step ahead only. Every measurement costs a backward and three forward passes, all in full
    precision: a network that only fits into memory by mixed precision may not fit.

    Attributes:
        alignment_every: the trainer measures before every step whose number is a multiple of this.
        alignment_held_out: whether ∇L_0 and ∇L_i are taken on different samples of the batch.
        momentum: of the mean over measurements.
    """

    alignment_every = 10
    alignment_held_out = False
    momentum = 0.9
    mean_alignment: Tensor

    def __init__(self, num_maps: int, share: float):
        super().__init__(num_maps, share)
        self.register_buffer("mean_alignment", torch.ones(num_maps))

    def align(self, alignment: Tensor) -> None:
        """Show the rule a measurement, ``(num_maps,)``; see :func:`measure_alignment`."""
        update_mean(self.mean_alignment, alignment, self.momentum, first=self.steps == 0)

    def raw(self) -> Tensor:
        tiny = torch.finfo(self.mean_alignment.dtype).tiny
        v = (self.mean_alignment / self.mean_alignment[0].clamp_min(tiny)).clamp(0, 1)
        v[0] = 1
        return v


@RULES.register("alignment_held_out")
class AlignmentHeldOut(Alignment):
    """The same with ∇L_0 and ∇L_i on different samples of the batch: does a map help ``z_0`` on *other* images?

    Never on the validation cases of the fold: what is selected by them can't be judged by them.
    """

    alignment_held_out = True


class nnUNetTrainerLoMixAlignment(nnUNetTrainerLoMix):
    """LoMix by one of the rules of this module, which it shows how much each map helps ``z_0``."""

    rule = "alignment"
    anchor = "z_0"

    def train_step(self, batch: dict) -> dict:
        if self.loss.rule.steps % self.loss.rule.alignment_every == 0:
            self.loss.rule.align(self._measure(batch))
        return super().train_step(batch)

    def _measure(self, batch: dict) -> Tensor:
        """The alignment on a batch, under DDP the sum over the ranks."""
        network = self.network.module if self.is_ddp else self.network
        network = network._orig_mod if isinstance(network, OptimizedModule) else network
        data, target = batch["data"].to(self.device), batch["target"][0].to(self.device)
        alignment = measure_alignment(network, self.loss, data, target, self.loss.rule.alignment_held_out)
        if self.is_ddp:
            dist.all_reduce(alignment)
        return alignment
