"""Many maps: an unbiased estimate of the loss from a sample of the mutants at each step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnunet_lomix.loss.lomix import LoMixLoss


class SamplingLoMixLoss(LoMixLoss):
    """LoMix in which a training step evaluates all originals, but only a sample of the mutants.

    ``n = sampled_mutants`` mutants are drawn with replacement, each with the probability w_i / W, W = Σ w_i over the
    mutants. The sum Σ w_i L_i over the mutants is replaced by W times the mean of the drawn L_i: its expectation is
    the sum, and so is that of its gradient. Its variance is W² Var(L) / n, with the variance over mutants, by weight.
    The rule sees the last known loss of a mutant that wasn't drawn. The first step, and steps without gradient,
    evaluate all maps.

    The sample depends on the number of the step and on the weights alone: it disturbs no other random number, a resumed
    training draws the same, and so do all ranks of DDP. It is drawn on the device, which no host waits for.

    Args:
        sampled_mutants: n, from 1 to the number of mutants.
        args, kwargs: those of :class:`LoMixLoss`.

    Raises:
        ValueError: as :class:`LoMixLoss`, and if n is out of range.
    """

    last_losses: Tensor

    def __init__(self, *args: Any, sampled_mutants: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        mutants = len(self.maps) - self.num_scales
        if not 1 <= sampled_mutants <= mutants:
            raise ValueError(f"sampled_mutants must be between 1 and the {mutants} mutants, got {sampled_mutants}")
        self.sampled_mutants = sampled_mutants
        self.register_buffer("last_losses", torch.zeros(len(self.maps)))
        self._knows_losses = False
        self.register_load_state_dict_pre_hook(self._complete_state)

    def supervise_maps(self, outputs: Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        if not torch.is_grad_enabled():
            return super().supervise_maps(outputs, target)
        if not self._knows_losses:
            losses = self.losses(outputs, target)
            self.remember(slice(None), losses)
            self._knows_losses = True
            return self.weigh(losses)
        chosen, factors = self.draw(self.rule.steps)
        losses = self.losses(outputs, target, chosen)
        self.remember(chosen, losses)
        known = self.last_losses.clone()
        self.observe(known)
        return self.with_objective((factors * losses).sum(), known)

    @staticmethod
    def _complete_state(module: "SamplingLoMixLoss", state: dict[str, Any], prefix: str, *_: Any) -> None:
        """The state of a loss that doesn't sample knows no losses: the next step evaluates all maps."""
        module._knows_losses = f"{prefix}last_losses" in state
        state.setdefault(f"{prefix}last_losses", torch.zeros_like(module.last_losses))

    def remember(self, chosen: Tensor | slice, losses: Tensor) -> None:
        """Note the losses of the chosen maps; one that isn't finite leaves what was known before."""
        new, old = self.observed(losses).to(self.last_losses.dtype), self.last_losses[chosen]
        self.last_losses[chosen] = new.where(new.isfinite(), old)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """The maps that a step evaluates, all originals and n mutants, and the factors of their losses, both (S + n,).

        The originals are evaluated even without weight: DDP waits for gradients of all heads.
        """
        weights = self.weights()
        originals, mutants = weights[: self.num_scales], weights[self.num_scales :]
        generator = torch.Generator(weights.device).manual_seed(step)
        uniform = torch.rand(self.sampled_mutants, generator=generator, device=weights.device, dtype=weights.dtype)
        # from mutant to mutant the cumulated weights rise by what each has: a number is drawn from all of their range
        cumulated = mutants.cumsum(0)
        drawn = torch.searchsorted(cumulated, uniform * cumulated[-1], right=True).clamp_max(len(mutants) - 1)
        chosen = torch.cat([torch.arange(self.num_scales, device=weights.device), self.num_scales + drawn])
        return chosen, torch.cat([originals, (mutants.sum() / self.sampled_mutants).expand(self.sampled_mutants)])
