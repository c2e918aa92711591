"""nnU-Net's trainer with the LoMix loss in place of fixed-weight deep supervision."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.files import replacing, scratch
from nnunet_lomix.loss import DEFAULT_OPERATORS, LoMixLoss, SamplingLoMixLoss
from nnunet_lomix.nnunet.checkpoints import STATE
from nnunet_lomix.nnunet.datasets import require_root
from nnunet_lomix.weights.history import plot_history, write_history

HISTORY = "lomix_weights"  # our key in nnU-Net's logger: for each epoch a dict from map to weight
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def ends_with_a_sentence(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """What a user can mend ends nnU-Net's command with its sentence, not with a traceback."""

    @wraps(method)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return method(*args, **kwargs)
        except LoMixError as error:
            raise SystemExit(str(error)) from None

    return wrapped


class TrainingLog(logging.Handler):
    """Writes what our modules log, such as the choice of a backend, into a trainer's log."""

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
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


class nnUNetTrainerLoMix(nnUNetTrainer):
    """LoMix: all scales mixed by four operators, every map supervised, weights learned, half of the weight for z_0.

    Change it by a subclass with other class attributes, in a folder of ``nnUNet_extTrainer``::

        class nnUNetTrainerLoMixAdd(nnUNetTrainerLoMix):
            operators = ("add",)
            epochs = 50

    Attributes:
        operators: names of the operators.
        mixed_scales: how many of the finest scales are mixed; None for the smaller of 4 and all.
        rule: name of the weighting rule.
        share: guaranteed share of ``z_0`` in the weights.
        weight_ce, weight_dice: factors of the two terms of the loss of each map.
        backend: how the loss is computed: "plain", "lean" or "fused"; None for the one that suits (docs/method.md).
        sampled_mutants: how many mutants a step evaluates, drawn by weight; None for all.
        weights_lr, fusion_lr: constant learning rates of the weights and of the operators' parameters (AdamW).
        loss_weight_decay: weight decay of both.
        epochs: length of the training; None for nnU-Net's default.
    """

    operators: tuple[str, ...] = DEFAULT_OPERATORS
    mixed_scales: int | None = None
    rule = "barrier"
    share = 0.5
    weight_ce = 1.0
    weight_dice = 1.0
    backend: str | None = None
    sampled_mutants: int | None = None
    weights_lr = 1e-2
    fusion_lr = 1e-3
    loss_weight_decay = 0.0
    epochs: int | None = None

    @ends_with_a_sentence
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net wants its own signature
    ):
        for variable in ("nnUNet_preprocessed", "nnUNet_results"):
            require_root(variable)
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.epochs is not None:
            self.num_epochs = self.epochs
        self.loss: LoMixLoss  # -> self.initialize
        self.loss_optimizer: torch.optim.Optimizer | None = None  # -> self.initialize

    def initialize(self) -> None:
        TrainingLog.open(self)
        super().initialize()
        self.loss_optimizer = self.configure_loss_optimizer()
        self.print_to_log_file(
            f"LoMix: {len(self.loss.maps)} maps of {self.loss.num_scales} outputs; operators: "
            f"{', '.join(self.operators) or 'none'}; weighting rule: {self.rule}; guaranteed share of z_0: {self.share}"
        )
        self.logger.local_logger.my_fantastic_logging[HISTORY] = []
        if self.is_ddp:
            for parameter in self.loss.parameters():
                dist.broadcast(parameter.data, 0)

    @ends_with_a_sentence
    def _build_loss(self) -> LoMixLoss:
        if self.label_manager.num_segmentation_heads < (1 if self.label_manager.has_regions else 2):
            raise LoMixError(
                f"{self.plans_manager.dataset_name} has no label but the background: add one to 'labels' in its "
                "dataset.json, and plan and preprocess again."
            )
        scales = self._get_deep_supervision_scales() or []
        if len(scales) < 2:
            raise LoMixError(
                f"{type(self).__name__} mixes several decoder outputs, but this configuration has "
                f"{'only one' if self.enable_deep_supervision else 'deep supervision switched off'}: "
                "train it with nnUNetTrainerNoDeepSupervision."
            )
        try:
            loss = self.make_loss(
                self.label_manager.num_segmentation_heads,
                len(scales),
                self.operators,
                self.mixed_scales,
                self.rule,
                self.share,
                regions=self.label_manager.has_regions,
                ignore_label=self.label_manager.ignore_label,
                batch_dice=self.configuration_manager.batch_dice,
                weight_ce=self.weight_ce,
                weight_dice=self.weight_dice,
                ddp=self.is_ddp,
                backend=self.backend,
            )
        except ValueError as error:
            raise LoMixError(f"{type(self).__name__}: {error}.") from None
        return loss.to(self.device)

    def make_loss(self, *args: Any, **kwargs: Any) -> LoMixLoss:
        """The loss; a subclass may make another one.

        Args:
            args, kwargs: those of :class:`~nnunet_lomix.loss.LoMixLoss` for this dataset and configuration.

        Raises:
            ValueError: an attribute of the trainer doesn't fit; ends the training with this sentence.
        """
        if self.sampled_mutants is not None:
            return SamplingLoMixLoss(*args, **kwargs, sampled_mutants=self.sampled_mutants)
        return LoMixLoss(*args, **kwargs)

    def configure_loss_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimiser of the loss's own parameters, or None if it has none.

        They are kept apart from ``self.optimizer``, whose learning rates the scheduler overwrites in every group.
        """
        groups: list[dict[str, Any]] = [
            {"params": list(self.loss.rule.parameters()), "lr": self.weights_lr},
            {"params": list(self.loss.operators.parameters()), "lr": self.fusion_lr},
        ]
        groups = [g for g in groups if g["params"]]
        return torch.optim.AdamW(groups, weight_decay=self.loss_weight_decay) if groups else None

    def train_step(self, batch: dict) -> dict:
        if self.loss_optimizer is None:
            return super().train_step(batch)
        self.loss_optimizer.zero_grad(set_to_none=True)
        # nnU-Net's step may change the scale at its end, our gradients have the one before
        scale = 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()
        result = super().train_step(batch)
        self._step_loss_optimizer(self.loss_optimizer, scale)
        return result

    def _step_loss_optimizer(self, optimizer: torch.optim.Optimizer, scale: float) -> None:
        """One step on the mean gradient of all ranks; none if it isn't finite, as the gradient scaler does."""
        grads = [p.grad for p in self.loss.parameters() if p.grad is not None]
        if not grads:  # a sample of mutants without parameters, the same on all ranks
            return
        flat = torch.cat([g.flatten() for g in grads]) / scale
        if self.is_ddp:
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        if flat.isfinite().all():
            for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(mean.view_as(g))
            optimizer.step()

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

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with one key more, written in one stroke: a crash leaves the old file whole."""
        if self.local_rank != 0:  # writes nothing in nnU-Net either, and must not remove the files of rank 0
            return
        with replacing(filename) as whole, scratch(whole) as stock:
            super().save_checkpoint(str(stock))
            if not stock.exists():  # checkpointing is disabled
                return
            checkpoint = torch.load(stock, map_location="cpu", mmap=True, weights_only=False)
            checkpoint[STATE] = {
                "rule": self.rule,
                "maps": [m.name for m in self.loss.maps],
                "loss": self.loss.state_dict(),
                "optimizer": self.loss_optimizer and self.loss_optimizer.state_dict(),
                # not left in nnU-Net's own dictionary: the progress plot of another trainer would stop where it ends
                "history": checkpoint["logging"].pop(HISTORY),
            }
            torch.save(checkpoint, whole)
            del checkpoint  # Windows removes no file that is mapped

    @ends_with_a_sentence
    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        checkpoint = filename_or_checkpoint
        if isinstance(checkpoint, str):
            checkpoint = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=False)
        state = checkpoint.get(STATE)
        if state is None:
            self.print_to_log_file("The checkpoint has no LoMix state: the weights of the maps start anew.")
            self.logger.local_logger.my_fantastic_logging[HISTORY] = [{} for _ in range(self.current_epoch)]
            return
        # before the first release the operators were called mixers
        loss_state = {key.replace("mixers.", "operators.", 1): value for key, value in state["loss"].items()}
        found = state["rule"], state.get("maps"), loss_state.keys()
        if found != (self.rule, [m.name for m in self.loss.maps], self.loss.state_dict().keys()):
            raise LoMixError(
                f"The checkpoint was written by {checkpoint['trainer_name']} with other LoMix maps or another rule "
                f"than {type(self).__name__}'s: continue it as it was written, or start a new training."
            )
        self.loss.load_state_dict(loss_state)
        if self.loss_optimizer is not None:
            self._load_loss_optimizer(self.loss_optimizer, state["optimizer"])
        self.logger.local_logger.my_fantastic_logging[HISTORY] = state["history"]

    @staticmethod
    def _load_loss_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Restore the moments; learning rates and decay are those of the class, as it is now."""
        current = [{"lr": g["lr"], "weight_decay": g["weight_decay"]} for g in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, settings in zip(optimizer.param_groups, current, strict=True):
            group.update(settings)
