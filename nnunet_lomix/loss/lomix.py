"""LoMix as one loss module, for nnU-Net's and any other deeply supervised network."""

import logging
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from nnunet_lomix.loss.backends import BACKENDS, Backend, Case, choose
from nnunet_lomix.loss.criterion import Criterion, SumOverRanks, Target, full_precision
from nnunet_lomix.loss.grid import Grid
from nnunet_lomix.loss.maps import ORIGINAL, list_maps
from nnunet_lomix.loss.operators import OPERATORS, Original
from nnunet_lomix.loss.rules import RULES

DEFAULT_OPERATORS = ("add", "multiply", "concat", "fusion")
DEFAULT_MAX_MIXED_SCALES = 4
MOST_STRIDE = 8  # neighbouring pixels say nearly the same, distant ones don't
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
        return f"a tensor ({value.layout}, {value.dtype})".replace("torch.", "")
    return "an empty list" if isinstance(value, list | tuple) and not value else type(value).__name__


class FinestOutput(nn.Module):
    """The default anchor: the criterion of ``z_0`` on all pixels."""

    def __init__(self, criterion: Criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, outputs: Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """A scalar; arguments as for :meth:`LoMixLoss.forward`, or a network's only output."""
        target = _as_tensor(target if isinstance(target, Tensor) else target[0])
        if isinstance(outputs, Tensor):
            outputs = [outputs] if outputs.ndim == target.ndim else outputs.unbind(1)
        z_0 = _as_tensor(outputs[0])
        with full_precision(z_0.device.type):
            return self.criterion(z_0.to(torch.promote_types(z_0.dtype, torch.float32)), target)


class LoMixLoss(nn.Module):
    """share · A + (1 − share) · Σ w_i L_i, over the decoder outputs and all their mutants (LoMix, arXiv 2510.22995).

    L_i is nnU-Net's loss of the map i, cross-entropy − Dice, against the full-resolution target (section 3). The anchor
    A is a loss of the same outputs on all pixels, with a guaranteed share of the weight: the criterion of ``z_0``, or
    another one, such as nnU-Net's own deep supervision. For share = 1 the loss is A. The maps may be supervised on a
    grid of pixels (:mod:`~nnunet_lomix.loss.grid`).

    The weights w_i come from a weighting rule. The network sees them as constants; the parameters of the rule see the
    non-negative losses L_i + ``weight_dice`` as constants and minimise the rule's own objective. One backward pass
    gives all gradients.

    Mixing and losses are computed in fp32 under autocast (products of logits overflow fp16). For fp64 outputs convert
    the module, too: ``loss.double()``. Not supported: transforms of ``torch.func``, such as ``vmap``, and double
    backward.

    Args:
        num_classes: C, the channels of each output.
        num_scales: S, the number of outputs, at least 2.
        operators: names; ``()`` for none.
        mixed_scales: how many of the finest scales are mixed, K; default the smaller of S and 4. The coarser outputs
            stay as originals.
        rule: name of the weighting rule.
        share: share of the anchor, 0 to 1.
        anchor: None for the criterion of ``z_0``, or a module that is called as this one and gives a scalar.
        stride: of the grid: 1 supervises the maps on every pixel, 2 on every second one along each axis that the second
            output has half of, from an offset that moves from step to step.
        regions: sigmoid and regions (True) or softmax and classes (False).
        ignore_label: plain classes: the value of the target to ignore. Regions: if not None, the last channel of
            the target marks the pixels to ignore.
        batch_dice: one Dice a batch, not a sample.
        weight_ce, weight_dice: factors of the two terms of L_i.
        paper_dice: the Dice of the authors' code instead of nnU-Net's: squared denominators, one a batch, with the
            background.
        smooth: smoothing of the Dice.
        ddp: outputs are spread over the ranks of ``torch.distributed``: ``batch_dice`` is then that of all ranks.
            The parameters of this module need the mean of the gradients of all ranks: by a DDP wrapper around a module
            that has and computes this loss, or by yourself.
        backend: "plain" or "fused"; None for the one that suits the case (docs/method.md). Which one computes is
            logged once.

    Attributes:
        maps: all maps, the originals first.
        operators: by name, with their parameters; ``operators[m.operator](scales, m.scales)`` is the map m.
        rule: the weighting rule.
        criterion: what a map costs.
        last_losses: ``(len(self.maps),)``, the losses when they were last computed, detached; None before.

    Raises:
        ValueError: an unknown name; fewer than 2 outputs, or than 2 classes (1 region); K, share or stride out of
            range.

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
        stride: int = 1,
        regions: bool = False,
        ignore_label: int | None = None,
        batch_dice: bool = False,
        weight_ce: float = 1.0,
        weight_dice: float = 1.0,
        paper_dice: bool = False,
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
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"the share of the anchor must be between 0 and 1, got {share}")
        if anchor is not None and not callable(anchor):
            raise ValueError(
                f"the anchor must be None, for z_0, or a module that is called as the loss, got {anchor!r}"
            )
        if not isinstance(stride, int) or not 1 <= stride <= MOST_STRIDE:
            raise ValueError(f"the stride of the grid must be a whole number from 1 to {MOST_STRIDE}, got {stride!r}")
        if backend not in (None, *BACKENDS):
            raise ValueError(f"unknown backend {backend!r}; choose from: {', '.join(BACKENDS)}")
        self.num_classes = num_classes
        self.num_scales = num_scales
        self.maps = list_maps(num_scales, mixed_scales, operators)
        self.operators = nn.ModuleDict()
        for name, operator in [(ORIGINAL, Original), *((name, OPERATORS[name]) for name in operators)]:
            self.operators[name] = operator(num_classes, [m.scales for m in self.maps if m.operator == name])
        self.rule = RULES[rule](len(self.maps))
        if share and self.rule.free:
            raise ValueError(f"the rule {rule!r} has free weights and guarantees the anchor no share; set share = 0")
        dice: dict[str, Any] = dict(batch_dice=batch_dice, paper_dice=paper_dice, smooth=smooth, ddp=ddp)
        self.criterion = Criterion(regions, ignore_label, weight_ce=weight_ce, weight_dice=weight_dice, **dice)
        self.share = share
        self.anchor = FinestOutput(self.criterion) if anchor is None else anchor
        self.stride = stride
        self.backend = backend
        self.last_losses: Tensor | None = None
        self._backends: dict[tuple[object, ...], Backend] = {}  # by device and dtype
        self._grids: dict[tuple[object, ...], Grid] = {}  # by sizes, too

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept on a device, which a copy or a loaded loss may not have."""
        return self.__dict__ | {"_backends": {}, "_grids": {}, "last_losses": None}

    def weights(self) -> Tensor:
        """Weights w_i of the maps, ``(len(self.maps),)``, in the order of ``self.maps``, detached; they sum to 1.

        Those of the rule "softplus" are free.
        """
        with torch.no_grad():
            return self.rule.weights()

    def losses(self, outputs: Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """The loss of each map, ``(len(self.maps),)``; arguments as for :meth:`forward`."""
        outputs, target = self._checked(outputs, target)
        double = any(t.dtype == torch.float64 for t in (*outputs, *self.parameters()))
        with full_precision(target.device.type):
            losses = self._losses(outputs, target, torch.float64 if double else torch.float32)
        self.last_losses = losses.detach()
        return losses

    def _losses(self, outputs: Sequence[Tensor], target: Tensor, dtype: torch.dtype) -> Tensor:
        backend, grid = self._backend_for(dtype, target), self._grid_for(dtype, outputs)
        offset = grid.offset(self.rule.steps if torch.is_grad_enabled() else None)
        prepared = self.criterion.prepare(grid.select(target, offset), self.num_classes, dtype, offset.inside)
        pixels, of_row, finest = prod(grid.size), prod(grid.size[1:]), prod(target.shape[2:])
        rows = max(1, backend.pixels_at_once(len(target), pixels, finest) // of_row)

        def sums(fine_and_coarse: list[Tensor], matrices: list[Tensor], target: Target) -> Tensor:
            return backend(grid.scales(fine_and_coarse, matrices), target)

        targets = prepared.divide(rows * of_row)
        slabs = [(*slab, own) for slab, own in zip(grid.slabs(outputs, offset, rows), targets, strict=True)]
        if len(slabs) == 1:
            return self.criterion.losses(sums(*slabs[0]), prepared)
        # each slab is computed anew in the backward pass, so that one at a time is in memory
        parts = [checkpoint(sums, *slab, use_reentrant=False, preserve_rng_state=False) for slab in slabs]
        return self.criterion.losses(torch.stack(parts).sum(0), prepared)

    def maps_not_finite(self) -> list[str]:
        """Names of the maps whose losses were NaN or infinite when they were last computed; waits for the device."""
        finite = [] if self.last_losses is None else self.last_losses.isfinite().tolist()
        return [m.name for m, is_finite in zip(self.maps, finite, strict=False) if not is_finite]

    def forward(self, outputs: Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """The weighted loss, a scalar; with gradients enabled a training step, which :meth:`observe` counts.

        So a closure that an optimiser calls several times makes several steps, and so does accumulating gradients. The
        loss must not be computed anew in the backward pass, as torch.utils.checkpoint would.

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
        if self.share == 1:  # nothing else has weight, and a training is to the last bit that of the anchor alone
            self._checked(outputs, target)
            alone: Tensor = self.anchor(outputs, target)
            return alone
        losses = self.losses(outputs, target)  # before the anchor, as it looks at shapes and labels
        observed = self.observed(losses)
        if torch.is_grad_enabled():
            self.observe(observed)
        total = (1 - self.share) * (self.weights().to(losses.dtype) @ losses)
        if self.share > 0:
            total = torch.add(total, self.anchor(outputs, target), alpha=self.share)
        objective = self.rule.objective(observed)
        return total if objective is None else total + (objective - objective.detach())

    def observed(self, losses: Tensor) -> Tensor:
        """What a rule may see of losses: non-negative, though rounding may make them less, detached, in its dtype."""
        dtype = next((p.dtype for p in self.rule.parameters()), losses.dtype)
        return (losses.detach() - self.criterion.minimum).clamp_min(0).to(dtype)

    def observe(self, observed: Tensor) -> None:
        """Count a training step, and show the rule its losses, as from :meth:`observed`.

        Where there is a process group it sees the mean of all ranks, so that their weights start alike, whoever made
        the group: each rank has to make the step.
        """
        if dist.is_available() and dist.is_initialized():
            observed = SumOverRanks.apply(observed) / dist.get_world_size()
        self.rule.observe(observed)

    def _backend_for(self, dtype: torch.dtype, target: Tensor) -> Backend:
        """The named backend, or the one that suits; logged, as a warning if it isn't the named one.

        Where it is chosen, and on a CPU always, the values of the target are looked at.
        """
        compiling = torch.compiler.is_compiling()
        key = (target.device, dtype, self.backend, compiling)
        if not compiling and (target.device.type == "cpu" or key not in self._backends):
            self.criterion.check_values(target, self.num_classes)
        if key not in self._backends:
            operators = dict(self.operators.items())
            case = Case(self.maps, operators, self.criterion, self.num_classes, self.num_scales, target.device, dtype)
            name, self._backends[key], refusal = choose(case, self.backend)
            if not compiling:
                level = logging.INFO if self.backend in (None, name) else logging.WARNING
                text = f"LoMix: the backend {name!r} computes the loss of {len(self.maps)} maps"
                logger.log(level, f"{text}; {refusal}" if refusal else text)
        return self._backends[key]

    def _grid_for(self, dtype: torch.dtype, outputs: Sequence[Tensor]) -> Grid:
        """Logged as a warning if the stride has no effect."""
        sizes, device = tuple(tuple(z.shape[2:]) for z in outputs), outputs[0].device
        key = (sizes, self.stride, device, dtype)
        if key not in self._grids:
            self._grids[key] = Grid(sizes, self.stride, device, dtype)
            if self.stride > 1 and self._grids[key].cycle == 1 and not torch.compiler.is_compiling():
                logger.warning("LoMix: stride = %d has no effect, as no axis of the second output is half", self.stride)
        return self._grids[key]

    def _checked(self, outputs: Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        """The outputs as a list, and the target of full resolution, if they fit."""
        if isinstance(target, list | tuple) and target:
            target = target[0]
        if not isinstance(target, Tensor):
            raise ValueError(f"the target must be a tensor, or a list that starts with one, got {_describe(target)}")
        if isinstance(outputs, Tensor) and outputs.ndim > max(4, target.ndim):  # a target may lack its channel
            outputs = outputs.unbind(1)
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
        devices = {t.device for t in (*outputs, target, *self.parameters(), *self.buffers())}
        if len(devices) > 1:
            raise ValueError(
                f"the outputs, the target and the loss must be on the same device, but they are on "
                f"{' and '.join(sorted(map(str, devices)))}; move the loss by loss.to(device)"
            )
        channels, size = self.criterion.target_channels(self.num_classes), tuple(target.shape[2:])
        if target.ndim not in (4, 5) or target.shape[1] != channels:
            last = ", the last one for ignored pixels" if channels > self.num_classes else ""
            one_hot = target.ndim in (4, 5) and channels == 1 and target.shape[1] == self.num_classes
            hint = "; if it is one-hot, give target.argmax(1, keepdim=True)" if one_hot else ""
            raise ValueError(
                f"the target must be (B, {channels}, *spatial), 2D or 3D{last}; got {tuple(target.shape)}{hint}"
            )
        if other := {p.dtype for p in self.parameters()} - {torch.float32, torch.float64}:
            raise ValueError(
                f"the loss is in {other.pop()}, but it computes in float32 or float64, whatever its outputs are: call "
                "loss.float(), and convert the network alone"
            )
        is_double = all(p.dtype == torch.float64 for p in self.operators.parameters())
        if not is_double and any(z.dtype == torch.float64 for z in outputs):
            raise ValueError("the outputs are float64, the loss isn't; convert it: loss.double()")
        for z in outputs:
            if z.ndim != target.ndim or z.shape[:2] != (len(target), self.num_classes):
                raise ValueError(
                    f"each output must be (B, C, *spatial) with B = {len(target)}, C = {self.num_classes} and "
                    f"{len(size)} spatial axes, as the target, got {tuple(z.shape)}"
                )
        if not all(z.numel() for z in outputs):
            raise ValueError("there must be at least one sample, and each output must have at least one pixel")
        if outputs[0].shape[2:] != size:
            given = str(tuple(outputs[0].shape[2:]))
            raise ValueError(f"the first output must have the size of the target, {size}, got {given}")
        return [_as_tensor(z) for z in outputs], _as_tensor(target)
