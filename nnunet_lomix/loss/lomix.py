"""LoMix as one loss module, for nnU-Net's and any other deeply supervised network."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from nnunet_lomix.loss.backends import BACKENDS, Case, choose
from nnunet_lomix.loss.backends.base import Backend, BoundMap, full_precision
from nnunet_lomix.loss.criterion import ClassCriterion, Criterion, RegionCriterion, SumOverRanks
from nnunet_lomix.loss.maps import list_maps
from nnunet_lomix.loss.operators import OPERATORS, Original
from nnunet_lomix.loss.rules import RULES

DEFAULT_OPERATORS = ("add", "multiply", "concat", "fusion")
DEFAULT_MAX_MIXED_SCALES = 4
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of outputs
logger = logging.getLogger(__name__)


def _as_tensor(tensor: Tensor) -> Tensor:
    """A plain tensor with the same values: MONAI's and other subclasses do something else in some operations."""
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def _describe(value: object) -> str:
    """What was given instead of what was expected.

    >>> _describe(torch.zeros(2, dtype=torch.int64)), _describe([]), _describe(None)
    ('a tensor (strided, int64)', 'an empty list', 'NoneType')
    """
    if isinstance(value, Tensor):
        return f"a tensor ({', '.join(str(kind).removeprefix('torch.') for kind in (value.layout, value.dtype))})"
    return "an empty list" if isinstance(value, list | tuple) and not value else type(value).__name__


def _adapt_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """States of a loss that samples are loaded by one that doesn't, and states from before operators had their name."""
    if not hasattr(module, "last_losses"):
        state.pop(f"{prefix}last_losses", None)
    for key in [key for key in state if key.startswith(f"{prefix}mixers.")]:
        state[key.replace("mixers.", "operators.", 1)] = state.pop(key)


class LoMixLoss(nn.Module):
    """Σ w_i L_i over the decoder outputs and all their mutants (LoMix, arXiv 2510.22995, section 3).

    L_i is nnU-Net's loss of the map i, cross-entropy − Dice, against the full-resolution target. A share of the weight
    is guaranteed to an anchor: to the map ``z_0``, or to another loss of the same outputs, such as nnU-Net's own deep
    supervision D. Then the loss is share · D + (1 − share) · Σ v_i L_i / Σ v_i; for share = 1 it is D. The effective
    weights w_i come from a weighting rule. The network sees them as constants; the parameters of the rule see
    the non-negative losses L_i + ``weight_dice`` as constants and minimise the rule's own objective. One backward pass
    gives all gradients. The value is Σ w_i L_i.

    Mixing and losses are computed in fp32 under autocast (products of logits overflow fp16). For fp64 outputs convert
    the module, too: ``loss.double()``.

    Args:
        num_classes: number of channels C of each output.
        num_scales: number of outputs S, at least 2.
        operators: names of the operators; ``()`` for none.
        mixed_scales: how many of the finest scales are mixed, K; default the smaller of S and 4. The coarser outputs
            stay as originals.
        rule: name of the weighting rule.
        share: share of the weight that the anchor has at least, 0 to 1.
        anchor: None for ``z_0``, or a module that is called as this one and gives a scalar.
        regions: sigmoid and regions (True) or softmax and classes (False).
        ignore_label: plain classes: the value of the target to ignore. Regions: if not None, the last channel of
            the target marks the pixels to ignore.
        batch_dice: one Dice a batch, not a sample.
        weight_ce, weight_dice: factors of the two terms of L_i.
        smooth: smoothing of the Dice.
        ddp: outputs are spread over the ranks of ``torch.distributed``: ``batch_dice`` is then that of all ranks.
            The parameters of this module belong to no DDP wrapper: average their gradients yourself.
        backend: "plain", "lean" or "fused"; None for the one that suits the case (docs/method.md). Which one computes
            is logged once.

    Attributes:
        maps: all maps, the originals first.
        operators: for each map, by its name, the operator with its parameters.
        rule: the weighting rule.
        criterion: what a map costs.

    Raises:
        ValueError: an unknown name; fewer than 2 outputs, or than 2 classes (1 region); K or share out of range.

    >>> import torch
    >>> loss = LoMixLoss(num_classes=3, num_scales=3)
    >>> outputs = [torch.randn(2, 3, 32 // 2**j, 32 // 2**j, requires_grad=True) for j in range(3)]
    >>> target = torch.randint(3, (2, 1, 32, 32))
    >>> loss(outputs, target).backward()
    >>> len(loss.maps), round(float(loss.weights().sum()), 4)
    (19, 1.0)
    """

    def __init__(
        self,
        num_classes: int,
        num_scales: int,
        operators: Sequence[str] = DEFAULT_OPERATORS,
        mixed_scales: int | None = None,
        rule: str = "barrier",
        share: float = 0.5,
        *,
        anchor: nn.Module | None = None,
        regions: bool = False,
        ignore_label: int | None = None,
        batch_dice: bool = False,
        weight_ce: float = 1.0,
        weight_dice: float = 1.0,
        smooth: float = 1e-5,
        ddp: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        mixed_scales = min(num_scales, DEFAULT_MAX_MIXED_SCALES) if mixed_scales is None else mixed_scales
        if num_scales < 2:
            raise ValueError(f"LoMix mixes the outputs of several scales, but there is {num_scales}")
        if not 1 <= mixed_scales <= num_scales:
            raise ValueError(f"mixed_scales must be between 1 and the {num_scales} outputs, got {mixed_scales}")
        if num_classes < (1 if regions else 2):
            raise ValueError(f"there must be at least 2 classes, with the background, or 1 region, got {num_classes}")
        if isinstance(operators, str) or len(set(operators)) < len(operators):
            raise ValueError(f"operators must be a list that names each operator once, got {operators!r}")
        if not 0 <= share <= 1:
            raise ValueError(f"the share of the anchor must be between 0 and 1, got {share}")
        self.num_classes = num_classes
        self.num_scales = num_scales
        self.maps = list_maps(num_scales, mixed_scales, operators)
        self.operators = nn.ModuleDict(
            {
                m.name: OPERATORS[m.operator](num_classes, len(m.scales)) if len(m.scales) > 1 else Original()
                for m in self.maps
            }
        )
        self.share = share
        self.anchor = anchor
        self.rule = RULES[rule](len(self.maps), share if anchor is None else 0.0)
        terms = dict(weight_ce=weight_ce, weight_dice=weight_dice, batch_dice=batch_dice, smooth=smooth, ddp=ddp)
        self.criterion: Criterion = (
            RegionCriterion(ignore_label is not None, **terms) if regions else ClassCriterion(ignore_label, **terms)
        )
        if backend is not None:
            BACKENDS.check(backend)
        self.backend = backend
        self._bound_maps = [BoundMap(self.operators[m.name], m.scales) for m in self.maps]
        self._backends: dict[tuple[object, ...], Backend] = {}  # for each kind of case
        self._logged: set[str] = set()
        self._looked_at_a_target = False
        self._latest: tuple[Tensor | None, Tensor] | None = None  # chosen maps and losses, of the latest call
        self.register_load_state_dict_pre_hook(_adapt_state)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept on a device, which a copy or a loaded loss may not have."""
        return self.__dict__ | {"_backends": {}, "_latest": None}

    def weights(self) -> Tensor:
        """Effective weights of the maps, ``(len(self.maps),)``, in the order of ``self.maps``, detached.

        They sum to 1, or to 1 - share beside an anchor that is no map.
        """
        weights = self.rule.weights().detach()
        return weights if self.anchor is None else (1 - self.share) * weights

    def losses(
        self, outputs: Sequence[Tensor], target: Tensor | Sequence[Tensor], chosen: Tensor | None = None
    ) -> Tensor:
        """The loss of each map, ``(len(self.maps),)``; arguments as for :meth:`forward`.

        Args:
            chosen: numbers in ``self.maps`` of those maps that are wanted instead, int64 on the device of the outputs,
                ``(M,)``; then the result is ``(M,)``.
        """
        if isinstance(target, list | tuple) and target:
            target = target[0]
        if not isinstance(target, Tensor):
            raise ValueError(f"the target must be a tensor, or a list that starts with one, got {_describe(target)}")
        target = _as_tensor(target)
        if isinstance(outputs, Tensor) and outputs.ndim == target.ndim + 1:
            outputs = outputs.unbind(1)
        self._check(outputs, target)
        with full_precision(outputs[0].device.type):
            dtype = torch.promote_types(outputs[0].dtype, torch.float32)
            for other in {p.dtype for p in self.operators.parameters()}:
                dtype = torch.promote_types(dtype, other)
            outputs = [_as_tensor(z).to(dtype) for z in outputs]
            prepared = self.criterion.prepare(target, self.num_classes, dtype)
            if target.device.type == "cpu" or not self._looked_at_a_target:
                self._check_values(target)
            backend = self._backend_for(outputs[0], len(self.maps) if chosen is None else len(chosen))
            losses = self.criterion.losses(*backend(outputs, prepared, self._bound_maps, self.criterion, chosen))
        self._latest = chosen, losses.detach()
        return losses

    def maps_not_finite(self) -> list[str]:
        """Names of the maps whose losses were NaN or infinite when they were last computed; waits for the device."""
        if self._latest is None:
            return []
        chosen, losses = self._latest
        numbers = range(len(self.maps)) if chosen is None else chosen.tolist()
        broken = {number for number, finite in zip(numbers, losses.isfinite().tolist(), strict=True) if not finite}
        return [m.name for number, m in enumerate(self.maps) if number in broken]

    def forward(self, outputs: Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """The weighted loss, a scalar.

        Args:
            outputs: S tensors of logits ``(B, C, *spatial_j)``, 2D or 3D, the finest first; or one tensor
                ``(B, S, C, *spatial)`` of them all, as MONAI's DynUNet gives it.
            target: the target at full resolution, or a list that starts with it (nnU-Net gives one for each output);
                ``(B, 1, *spatial)`` of labels, or ``(B, C, *spatial)`` of regions (C + 1 with an ignore channel).

        Raises:
            ValueError: number, shape or dtype of the outputs, or the shape of the target, don't fit, or its values are
                no labels, or no regions. Values are looked at in every step on a CPU and in the first one elsewhere: a
                GPU would have to be waited for, and an assertion on the device would end the whole process.
        """
        if self.anchor is None:
            return self.supervise_maps(outputs, target)
        if self.share == 1:  # nothing else has weight, and a training is to the last bit that of the anchor alone
            alone: Tensor = self.anchor(outputs, target)
            return alone
        maps = self.supervise_maps(outputs, target)  # first, as it looks at shapes and labels
        anchor: Tensor = self.anchor(outputs, target)
        return self.share * anchor + maps

    def supervise_maps(self, outputs: Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """The weighted loss of the maps alone, a scalar; arguments as for :meth:`forward`."""
        return self.weigh(self.losses(outputs, target))

    def weigh(self, losses: Tensor) -> Tensor:
        """Σ w_i L_i, ``losses`` as of :meth:`losses`, with the gradients of the rule's parameters."""
        observed = self.observed(losses)
        self.observe(observed)
        return self.with_objective((self.weights() * losses).sum(), observed)

    def observed(self, losses: Tensor) -> Tensor:
        """What a rule may see of losses: non-negative and detached."""
        return (losses - self.criterion.minimum).detach()

    def observe(self, observed: Tensor) -> None:
        """Show the rule the losses of a training step, under DDP the mean over ranks."""
        if torch.is_grad_enabled():
            self.rule.observe(SumOverRanks.apply(observed) / dist.get_world_size() if self.criterion.ddp else observed)

    def with_objective(self, loss: Tensor, observed: Tensor) -> Tensor:
        """The same value, with the gradients of the rule's parameters."""
        objective = self.rule.objective(observed)
        return loss if objective is None else loss + objective - objective.detach()

    def chosen_backends(self) -> list[Backend]:
        """The backends that have computed so far, one for each kind of case."""
        return list(self._backends.values())

    def _backend_for(self, z_0: Tensor, evaluated: int) -> Backend:
        """The named backend, or the one that suits; logged once, as a warning if it isn't the named one."""
        key = (z_0.device, z_0.dtype, z_0.shape, evaluated, self.backend)
        if key not in self._backends:
            case = Case(z_0.device, z_0.dtype, z_0.shape, self._bound_maps, evaluated, self.criterion)
            name, self._backends[key], refusals = choose(case, self.backend)
            text = f"LoMix: the backend {name!r} computes the loss of {evaluated} maps"
            text += "".join(f"; {other!r} can't be used: {reason}" for other, reason in refusals.items())
            level = logging.INFO if self.backend in (None, name) else logging.WARNING
            if not torch.compiler.is_compiling() and text not in self._logged:
                self._logged.add(text)
                logger.log(level, text)
        return self._backends[key]

    def _check_values(self, target: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        self.criterion.check_values(target, self.num_classes)
        self._looked_at_a_target = True

    def _check(self, outputs: Sequence[Tensor], target: Tensor) -> None:
        if not isinstance(outputs, list | tuple) or len(outputs) != self.num_scales:
            given = "a single tensor" if isinstance(outputs, Tensor) else _describe(outputs)
            given = str(len(outputs)) if isinstance(outputs, list | tuple) else given
            raise ValueError(f"expected a list of {self.num_scales} outputs, got {given}; is deep supervision on?")
        for z in outputs:
            if not isinstance(z, Tensor) or z.layout != torch.strided or z.dtype not in DTYPES:
                raise ValueError(
                    f"each output must be a dense tensor in float16, bfloat16, float32 or float64, got {_describe(z)}"
                )
        if target.layout != torch.strided or target.is_complex():
            raise ValueError(f"the target must be a dense tensor of real numbers, got {_describe(target)}")
        devices = {t.device for t in (*outputs, target, *self.parameters())}
        if len(devices) > 1:
            raise ValueError(
                f"the outputs, the target and the loss must be on the same device, but they are on "
                f"{' and '.join(sorted(map(str, devices)))}; move the loss by loss.to(device)"
            )
        channels = self.criterion.target_channels(self.num_classes)
        if target.ndim not in (4, 5) or target.shape[1] != channels:
            last = ", the last one for ignored pixels" if channels > self.num_classes else ""
            raise ValueError(f"the target must be (B, {channels}, *spatial), 2D or 3D{last}; got {tuple(target.shape)}")
        dtypes = {p.dtype for p in self.operators.parameters()}
        if other := {p.dtype for p in self.parameters()} - {torch.float32, torch.float64}:
            raise ValueError(
                f"the loss was converted to {other.pop()}, but it computes in float32 or float64, whatever its outputs "
                "are: convert the network alone"
            )
        if any(z.dtype == torch.float64 for z in outputs) and dtypes - {torch.float64}:
            raise ValueError("the outputs are float64, the loss isn't; convert it: loss.double()")
        for z in outputs:
            if z.ndim != target.ndim or z.shape[:2] != (len(target), self.num_classes):
                raise ValueError(
                    f"each output must be (B, C, *spatial) with B = {len(target)}, C = {self.num_classes} and "
                    f"{target.ndim - 2} spatial axes, as the target, got {tuple(z.shape)}"
                )
        if not all(z.numel() for z in outputs):
            raise ValueError("there must be at least one sample, and each output must have at least one pixel")
        if outputs[0].shape[2:] != target.shape[2:]:
            raise ValueError(
                f"the first output must have the size of the target, {tuple(target.shape[2:])}, "
                f"got {tuple(outputs[0].shape[2:])}"
            )
