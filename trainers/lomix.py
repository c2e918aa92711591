"""nnU-Net's trainer with the LoMix loss in place of fixed-weight deep supervision."""

import logging
from difflib import get_close_matches
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor
from torch import distributed as dist

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.loss import DEFAULT_OPERATORS, LoMixLoss
from nnunet_lomix.nnunet.checkpoints import STATE
from nnunet_lomix.nnunet.internals import set_logged
from nnunet_lomix.trainers.base import BaseTrainer, ending_with_a_sentence
from nnunet_lomix.weights.history import plot_history, write_history

HISTORY = "lomix_weights"  # our key in nnU-Net's logger: for each epoch a dict from map to weight


class TrainingLog(logging.Handler):
    """Writes what our modules log into a trainer's log."""

    def __init__(self, trainer: nnUNetTrainer):
        super().__init__(logging.INFO)
        self.trainer = trainer

    def emit(self, record: logging.LogRecord) -> None:
        self.trainer.print_to_log_file(record.getMessage())

    @classmethod
    def open(cls, trainer: nnUNetTrainer) -> None:
        """Log into this trainer's log, no longer into that of an earlier one; an application's handlers stay."""
        logger = logging.getLogger("nnunet_lomix")
        for handler in [h for h in logger.handlers if isinstance(h, cls)]:
            logger.removeHandler(handler)
        logger.addHandler(cls(trainer))
        logger.propagate = False  # the trainer's log is on the console, too
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


class nnUNetTrainerLoMix(BaseTrainer):
    """LoMix: half nnU-Net's own loss, half that of all scales mixed by four operators, with weights that are learned.

    Change it by a subclass with other class attributes, in a folder of ``nnUNet_extTrainer``::

        class nnUNetTrainerLoMixAdd(nnUNetTrainerLoMix):
            operators = ("add",)
            epochs = 50

    Attributes:
        operators: names of the operators.
        mixed_scales: how many of the finest scales are mixed; None for the smaller of 4 and all.
        rule: name of the weighting rule.
        anchor: what has a guaranteed share of the loss, on every pixel: "deep_supervision", nnU-Net's own loss with its
            weights and targets, or "z_0", the finest output.
        share: of the anchor, 0 to 1; 1 of "deep_supervision" is nnUNetTrainer. The rest is for the weighted maps.
        stride: of the grid of pixels on which the maps are supervised: 2 for every second one along each axis that the
            second output has half of, from an offset that moves from step to step; 1 for every pixel.
        weight_ce, weight_dice: factors of the two terms of the loss of each map.
        paper_dice: the Dice of the authors' code instead of nnU-Net's, for each map and the anchor z_0.
        backend: how the loss is computed: "plain" or "fused"; None for the one that suits (docs/method.md).
        weights_lr, fusion_lr: constant learning rates of the weights and of the operators' parameters (AdamW).
        loss_weight_decay: weight decay of both.
        epochs: length of the training; None for nnU-Net's default.
        loss_optimizer: of the loss's own parameters; None before the trainer is initialised, and if there are none.
    """

    operators: tuple[str, ...] = DEFAULT_OPERATORS
    mixed_scales: int | None = None
    rule = "barrier"
    anchor = "deep_supervision"
    share = 0.5
    stride = 2
    weight_ce = 1.0
    weight_dice = 1.0
    paper_dice = False
    backend: str | None = None
    weights_lr = 1e-2
    fusion_lr = 1e-3
    loss_weight_decay = 0.0
    loss: LoMixLoss  # nnU-Net's
    loss_optimizer: torch.optim.Optimizer | None = None

    def check(self, configuration: ConfigurationManager) -> None:
        super().check(configuration)
        # one of two losses would be dropped without a word
        for base in self._combined_with():
            if "_build_loss" in vars(base):
                raise LoMixError(
                    f"{type(self).__name__} combines {base.__name__}, which brings a loss of its own, with LoMix: "
                    "leave it out, and set weight_ce and weight_dice, or override make_loss, instead."
                )
        for setting in ("weights_lr", "fusion_lr", "loss_weight_decay"):
            self._require_number(setting)

    @ending_with_a_sentence()
    def initialize(self) -> None:
        TrainingLog.open(self)
        self._require_several_outputs()
        super().initialize()
        self.loss_optimizer = self.configure_loss_optimizer()
        self.print_to_log_file(
            f"LoMix: {len(self.loss.maps)} maps of {self.loss.num_scales} outputs; operators: "
            f"{', '.join(self.operators) or 'none'}; weighting rule: {self.rule}; share of the anchor, {self.anchor}: "
            f"{self.share}; stride of the grid of pixels: {self.stride}"
        )
        self._warn_of_misspelt_settings()
        set_logged(self, HISTORY, [])
        if self.is_ddp:
            for parameter in self.loss.parameters():
                dist.broadcast(parameter.data, 0)

    def _warn_of_misspelt_settings(self) -> None:
        """They would change nothing, without a word; but an attribute may be the subclass's own."""
        plain = (int, float, str, tuple, list, type(None))
        settings = [n for c in (BaseTrainer, nnUNetTrainerLoMix) for n, v in vars(c).items() if isinstance(v, plain)]
        for name in (n for c in type(self).__mro__ for n, v in vars(c).items() if isinstance(v, plain)):
            close = get_close_matches(name, settings, 1, 0.85)
            if close and not hasattr(nnUNetTrainerLoMix, name):
                self.print_to_log_file(f"LoMix doesn't read {name} of {type(self).__name__}: is it {close[0]}?")

    def _build_loss(self) -> LoMixLoss:
        if self.label_manager.num_segmentation_heads < (1 if self.label_manager.has_regions else 2):
            raise LoMixError(
                f"{self.plans_manager.dataset_name} has no label but the background: add one to 'labels' in its "
                "dataset.json, and plan and preprocess again."
            )
        try:
            loss = self.make_loss(
                self.label_manager.num_segmentation_heads,
                len(self._get_deep_supervision_scales()),
                self.operators,
                self.mixed_scales,
                self.rule,
                self.share,
                anchor=self._build_anchor(),
                stride=self.stride,
                regions=self.label_manager.has_regions,
                ignore_label=self.label_manager.ignore_label,
                batch_dice=self.configuration_manager.batch_dice,
                weight_ce=self.weight_ce,
                weight_dice=self.weight_dice,
                paper_dice=self.paper_dice,
                ddp=self.is_ddp,
                backend=self.backend,
            )
        except ValueError as error:
            raise LoMixError(f"{type(self).__name__}: {error}.") from None
        return loss.to(self.device)

    def _build_anchor(self) -> torch.nn.Module | None:
        """nnU-Net's deep supervision as the anchor; None for ``z_0``."""
        if self.anchor == "z_0":
            return None
        if self.anchor != "deep_supervision":
            raise ValueError(f"the anchor must be 'z_0' or 'deep_supervision', not {self.anchor!r}")
        anchor = super()._build_loss()
        anchor.loss.weight_ce, anchor.loss.weight_dice = self.weight_ce, self.weight_dice
        return anchor

    def _require_several_outputs(self) -> None:
        """Before the network is made, as one with a single output may not be made for these plans at all."""
        if len(self._get_deep_supervision_scales() or []) > 1:
            return
        one = "only one" if self.enable_deep_supervision else "deep supervision switched off"
        why = f"this configuration has {one}: train it with nnUNetTrainerNoDeepSupervision"
        for base in self._combined_with():
            own_network = "build_network_architecture" in vars(base)
            if own_network and base.set_deep_supervision_enabled is not nnUNetTrainer.set_deep_supervision_enabled:
                why = f"the network of {base.__name__} has only one: train it with that trainer, without LoMix"
                break
        raise LoMixError(f"{type(self).__name__} mixes several decoder outputs, but {why}.")

    def _combined_with(self) -> list[type[nnUNetTrainer]]:
        """Trainers that bring something beside LoMix, the nearest first."""
        bases = [base for base in type(self).__mro__ if issubclass(base, nnUNetTrainer)]
        return [base for base in bases if not issubclass(base, nnUNetTrainerLoMix) and base is not nnUNetTrainer]

    def make_loss(self, *args: Any, **kwargs: Any) -> LoMixLoss:
        """The loss for this dataset and configuration, by LoMixLoss's arguments; a subclass may make another one.

        Raises:
            ValueError: an attribute of the trainer doesn't fit; ends the training with this sentence.
        """
        return LoMixLoss(*args, **kwargs)

    def configure_loss_optimizer(self) -> torch.optim.Optimizer | None:
        """Of the loss's own parameters, as the scheduler overwrites the learning rates of every group in nnU-Net's."""
        parts = ((self.loss.rule, self.weights_lr), (self.loss.operators, self.fusion_lr))
        groups = [{"params": params, "lr": lr} for part, lr in parts if (params := list(part.parameters()))]
        return torch.optim.AdamW(groups, weight_decay=self.loss_weight_decay, fused=True) if groups else None

    def train_step(self, batch: dict) -> dict:
        if self.loss_optimizer is None:
            return super().train_step(batch)
        self.loss_optimizer.zero_grad(set_to_none=True)
        result = super().train_step(batch)
        self.step_loss_optimizer(self.loss_optimizer)
        return result

    def step_loss_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """One step on the mean gradient of all ranks; none if it isn't finite, or the network made none."""
        grads: list[Tensor] = []
        for p in self.loss.parameters():
            if p.grad is None:  # beside an anchor that has all of the weight
                p.grad = torch.zeros_like(p)
            grads.append(p.grad)
        flat = torch.cat([g.flatten() for g in grads]) / self.faults.scale  # what it was before nnU-Net's step
        if self.is_ddp:
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        means = flat.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [mean.view_as(g) for mean, g in zip(means, grads, strict=True)])
        # the squares, too: AdamW keeps them, and an infinite one for ever
        if self.faults.step_was_made() and flat.dot(flat).isfinite():
            optimizer.step()

    def parts_not_finite(self) -> list[str]:
        return self.loss.maps_not_finite() or ["the anchor"]

    def on_epoch_end(self) -> None:
        weights = {m.name: w for m, w in zip(self.loss.maps, self.loss.weights().tolist(), strict=True)}
        # before nnU-Net's part, which plots and saves what was logged, and counts the epoch
        self.logger.log(HISTORY, weights, self.current_epoch)
        text = " ".join(f"{name} {w:.4f}" for name, w in weights.items())
        self.print_to_log_file("LoMix weights", text, also_print_to_console=False)
        super().on_epoch_end()
        if self.local_rank == 0:
            history = self.logger.get_value(HISTORY, step=None)
            try:
                write_history(history, self.output_folder)
                plot_history(history, self.loss.maps, self.output_folder)
            except OSError as error:  # a full disk, or a table that is open elsewhere, must not end a training
                self.print_to_log_file(f"The LoMix weights could not be written: {error}")

    def add_state(self, checkpoint: dict) -> None:
        super().add_state(checkpoint)
        checkpoint[STATE] = self._loss_state() | {
            "optimizer": self.loss_optimizer and self.loss_optimizer.state_dict(),
            # not left in nnU-Net's own dictionary: the progress plot of another trainer would stop where it ends
            "history": checkpoint["logging"].pop(HISTORY),
        }

    def load_state(self, checkpoint: dict) -> None:
        super().load_state(checkpoint)
        state = checkpoint.get(STATE)
        if state is None:
            if self.current_epoch >= self.num_epochs:
                raise LoMixError(
                    f"The checkpoint in {self.output_folder} is of a training by {checkpoint['trainer_name']} that has "
                    f"ended: as a start for {type(self).__name__} give it by -pretrained_weights, and take it out of "
                    "this folder."
                )
            self.print_to_log_file("The checkpoint has no LoMix state: the weights of the maps start anew.")
            set_logged(self, HISTORY, [{} for _ in range(self.current_epoch)])
            return
        if kind_of(state) != kind_of(self._loss_state()):
            raise LoMixError(
                f"The checkpoint was written by {checkpoint['trainer_name']} with other LoMix maps, or another rule or "
                f"anchor than {type(self).__name__}'s, or by another version of nnunet_lomix: continue it as it was "
                "written, or start a new training."
            )
        self.loss.load_state_dict(state["loss"])
        if self.loss_optimizer is not None:
            # its moments; learning rates, decay and kind of AdamW are those of the class, as it is now
            settings = self.loss_optimizer.state_dict()["param_groups"]
            self.loss_optimizer.load_state_dict(state["optimizer"] | {"param_groups": settings})
        set_logged(self, HISTORY, state["history"])

    def _loss_state(self) -> dict[str, Any]:
        """What the loss is, and what it has learned."""
        maps = [m.name for m in self.loss.maps]
        return {"rule": self.rule, "anchor": self.anchor, "maps": maps, "loss": self.loss.state_dict()}


def kind_of(state: dict[str, Any]) -> tuple[Any, ...]:
    """In what our state and the trainer that continues it have to agree."""
    # what an earlier version wrote, and what a rule of one's own may add, isn't always a tensor
    shapes = {key: getattr(value, "shape", None) for key, value in state["loss"].items()}
    return state["rule"], state.get("anchor"), state.get("maps"), shapes
