"""nnU-Net's trainer with the LoMix loss in place of fixed-weight deep supervision."""

import os
from functools import partial
from logging import Handler, getLogger

import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist
from torch._dynamo import OptimizedModule

from nnunet_lomix.alignment import measure_alignment
from nnunet_lomix.checkpoints import STATE
from nnunet_lomix.distillation import DistillingLoMixLoss
from nnunet_lomix.files import replacing, scratch
from nnunet_lomix.history import plot_history, write_history
from nnunet_lomix.loss import DEFAULT_OPERATORS, LoMixLoss
from nnunet_lomix.sampling import SamplingLoMixLoss

HISTORY = "lomix_weights"  # our key in nnU-Net's logger: for each epoch a dict from map to weight


class TrainingLog(Handler):
    """Writes what our modules log, such as the choice of a backend, into a trainer's log."""

    def __init__(self, trainer: nnUNetTrainer):
        super().__init__()
        self.trainer = trainer

    def emit(self, record):
        self.trainer.print_to_log_file(record.getMessage())


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
        backend: how the loss is computed: "plain", "lean", "compiled" or "fused"; None for the fastest that fits,
            with ``torch.compile`` where nnU-Net uses it and on CPUs; not if ``nnUNet_compile=f`` (docs/method.md).
        distillation: factor of a further term, by which the best map teaches ``z_0``; 0 for none.
        sampled_mutants: how many mutants a step evaluates, drawn by weight; None for all. Not with distillation.
        weights_lr, fusion_lr: constant learning rates of the weights and of the operators' parameters (AdamW).
        loss_weight_decay: weight decay of both.
        epochs: length of the training; None for nnU-Net's default.
    """

    operators = DEFAULT_OPERATORS
    mixed_scales: int | None = None
    rule = "barrier"
    share = 0.5
    weight_ce = 1.0
    weight_dice = 1.0
    backend: str | None = None
    distillation = 0.0
    sampled_mutants: int | None = None
    weights_lr = 1e-2
    fusion_lr = 1e-3
    loss_weight_decay = 0.0
    epochs: int | None = None

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net wants its own signature
    ):
        for variable in (nnUNet_preprocessed, nnUNet_results):
            if not variable.is_set():
                raise SystemExit(
                    f"The environment variable {variable.env_var_name} is not set; "
                    f"export {variable.env_var_name}=/your/folder before you train."
                )
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.epochs is not None:
            self.num_epochs = self.epochs
        self.loss_optimizer = None  # -> self.initialize

    def initialize(self):
        getLogger("nnunet_lomix").handlers = [TrainingLog(self)]
        super().initialize()
        self.loss_optimizer = self.configure_loss_optimizer()
        self.print_to_log_file(
            f"LoMix: {len(self.loss.maps)} maps of {self.loss.num_scales} outputs; operators: "
            f"{', '.join(self.operators) or 'none'}; weighting rule: {self.rule}; guaranteed share of z_0: {self.share}"
            f"; backend: {self.backend or 'the fastest that fits'}"
        )
        self.logger.local_logger.my_fantastic_logging[HISTORY] = []
        if self.is_ddp:
            for parameter in self.loss.parameters():
                dist.broadcast(parameter.data, 0)

    def _build_loss(self):
        if self.label_manager.num_segmentation_heads < (1 if self.label_manager.has_regions else 2):
            raise SystemExit(
                f"{self.plans_manager.dataset_name} has no label but the background: add one to 'labels' in its "
                "dataset.json, and plan and preprocess again."
            )
        scales = self._get_deep_supervision_scales() or []
        if len(scales) < 2:
            raise SystemExit(
                f"{type(self).__name__} mixes several decoder outputs, but this configuration has "
                f"{'only one' if self.enable_deep_supervision else 'deep supervision switched off'}: "
                "train it with nnUNetTrainerNoDeepSupervision."
            )
        if self.distillation and self.sampled_mutants:
            raise SystemExit(f"{type(self).__name__}: set either distillation or sampled_mutants, not both.")
        make = LoMixLoss
        if self.distillation:
            make = partial(DistillingLoMixLoss, distillation=self.distillation)
        elif self.sampled_mutants is not None:
            make = partial(SamplingLoMixLoss, sampled_mutants=self.sampled_mutants)
        try:
            loss = make(
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
                compile=self._do_i_compile_the_loss(),
            )
        except ValueError as error:
            raise SystemExit(f"{type(self).__name__}: {error}.") from None
        return loss.to(self.device)

    def _do_i_compile_the_loss(self) -> bool:
        """Where nnU-Net compiles; and on a CPU, where compiling a network is what it advises against, not a loss."""
        wanted = os.environ.get("nnUNet_compile", "true").lower() in ("true", "1", "t")
        return self._do_i_compile() or (self.device.type == "cpu" and wanted)

    def configure_loss_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimiser of the loss's own parameters, or None if it has none.

        They are kept apart from ``self.optimizer``, whose learning rates the scheduler overwrites in every group.
        """
        groups = [
            {"params": list(self.loss.rule.parameters()), "lr": self.weights_lr},
            {"params": list(self.loss.mixers.parameters()), "lr": self.fusion_lr},
        ]
        groups = [g for g in groups if g["params"]]
        return torch.optim.AdamW(groups, weight_decay=self.loss_weight_decay) if groups else None

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.loss.rule.progress = self.current_epoch / self.num_epochs

    def train_step(self, batch: dict) -> dict:
        every = self.loss.rule.alignment_every
        if every and self.loss.rule.steps % every == 0:
            self._align_rule(batch)
        if self.loss_optimizer is None:
            return super().train_step(batch)
        self.loss_optimizer.zero_grad(set_to_none=True)
        # nnU-Net's step may change the scale at its end, our gradients have the one before
        scale = 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()
        result = super().train_step(batch)
        self._step_loss_optimizer(scale)
        return result

    def _align_rule(self, batch: dict):
        """Show the rule how much each map helps z_0."""
        network = self.network.module if self.is_ddp else self.network
        network = network._orig_mod if isinstance(network, OptimizedModule) else network
        data, target = batch["data"].to(self.device), batch["target"][0].to(self.device)
        alignment = measure_alignment(network, self.loss, data, target, self.loss.rule.alignment_held_out)
        if self.is_ddp:
            dist.all_reduce(alignment)
        self.loss.rule.align(alignment)

    def _step_loss_optimizer(self, scale: float):
        """One step on the mean gradient of all ranks; none if it isn't finite, as the gradient scaler does."""
        gradients = [p.grad for p in self.loss.parameters() if p.grad is not None]
        if not gradients:  # a sample of mutants without parameters, the same on all ranks
            return
        flat = torch.cat([g.flatten() for g in gradients]) / scale
        if self.is_ddp:
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        if flat.isfinite().all():
            for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                g.copy_(mean.view_as(g))
            self.loss_optimizer.step()

    def on_epoch_end(self):
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

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        checkpoint = filename_or_checkpoint
        if isinstance(checkpoint, str):
            checkpoint = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=False)
        state = checkpoint.get(STATE)
        if state is None:
            self.print_to_log_file("The checkpoint has no LoMix state: the weights of the maps start anew.")
            state = {"history": [{}] * self.current_epoch}
        elif (state["rule"], state.get("maps"), state["loss"].keys()) != (
            self.rule,
            [m.name for m in self.loss.maps],
            self.loss.state_dict().keys(),
        ):
            raise SystemExit(
                f"The checkpoint was written by {checkpoint['trainer_name']} with other LoMix maps or another rule "
                f"than {type(self).__name__}'s: continue it as it was written, or start a new training."
            )
        else:
            self.loss.load_state_dict(state["loss"])
            if self.loss_optimizer is not None:
                self._load_loss_optimizer(state["optimizer"])
        self.logger.local_logger.my_fantastic_logging[HISTORY] = state["history"]

    def _load_loss_optimizer(self, state: dict):
        """Restore the moments; learning rates and decay are those of the class, as it is now."""
        current = [{"lr": g["lr"], "weight_decay": g["weight_decay"]} for g in self.loss_optimizer.param_groups]
        self.loss_optimizer.load_state_dict(state)
        for group, settings in zip(self.loss_optimizer.param_groups, current, strict=True):
            group.update(settings)
