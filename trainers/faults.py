"""Numerical faults: a step that isn't finite is left out, counted and named; what can't go on ends with a sentence."""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist

from nnunet_lomix.errors import LoMixError, shorten
from nnunet_lomix.loss.criterion import Criterion

# Left out one after the other; a gradient scaler needs 16 to come from its first scale, 2^16, down to 1.
MOST_IN_A_ROW = 25
REMEDY = (
    "Continue from the last checkpoint with --c; if it happens again, give a subclass of the trainer a lower "
    "initial_lr, or operators without 'multiply', whose products of logits grow fastest."
)


class UnitScaler(torch.amp.GradScaler):
    """For a CPU, where nnU-Net has none: leaves out a step whose gradients aren't finite; changes no other step."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=1.0, growth_interval=2**31 - 1)

    def state_dict(self) -> None:  # type: ignore[override]
        """Nothing, as nnU-Net writes on a CPU: on CUDA the training goes on with the scale that it has there."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the scale of 1 where a training from CUDA is continued."""


class Fault(NamedTuple):
    """A loss that wasn't finite."""

    parts: list[str]  # of it, those that weren't finite
    cases: list[str]  # all of the batch


class Faults:
    """Stands beside a trainer: counts the steps that its gradient scaler leaves out, and names what wasn't finite.

    Args:
        trainer: initialised, of any loss.
        name_parts: names the parts of the last loss that weren't finite.

    Attributes:
        losses: those that weren't finite in the present epoch's training or validation.
        scale: what the gradients of the last step were multiplied by.
    """

    def __init__(self, trainer: nnUNetTrainer, name_parts: Callable[[], list[str]]):
        self.trainer = trainer
        self.name_parts = name_parts
        self.losses: list[Fault] = []
        self.scale = 1.0
        self._left_out = self._in_a_row = self._longest_row = 0

    def watch(self, step: Callable[[dict], dict], batch: dict) -> dict:
        """Make a step of training or validation, and note its loss if that isn't finite.

        Raises:
            LoMixError: a label or an image of the batch is broken, so that each of its steps would fail; or a step was
                made with what isn't finite, as there is no gradient scaler (nnU-Net has none on MPS).
        """
        self.scale = self._next_scale()
        try:
            result = step(batch)
        except (ValueError, IndexError, RuntimeError):  # of any loss, or of a GPU
            self._name_broken_label(batch)
            raise
        if not np.isfinite(result["loss"]).all():
            self._note_loss(batch)
        return result

    def _next_scale(self) -> float:
        return 1.0 if self.trainer.grad_scaler is None else self.trainer.grad_scaler.get_scale()

    def note_step(self) -> None:
        """Count a training step if it was left out."""
        left_out = self._next_scale() < self.scale  # a scaler that leaves out a step reduces its scale
        self._left_out += left_out
        self._in_a_row = self._in_a_row + 1 if left_out else 0
        self._longest_row = max(self._longest_row, self._in_a_row)
        if isinstance(self.trainer.grad_scaler, UnitScaler):
            self.trainer.grad_scaler.update(1.0)

    def step_was_made(self) -> bool:
        """Whether the last training step wasn't left out."""
        return self._in_a_row == 0

    def _note_loss(self, batch: dict) -> None:
        fault = Fault(self.name_parts(), names_of(batch))
        finite = batch["data"].isfinite().flatten(1).all(1).tolist()
        broken = [case for case, is_finite in zip(fault.cases, finite, strict=True) if not is_finite]
        if broken:
            self._end_training(
                f": the preprocessed image of {shorten(broken)} has values that are NaN or infinite: mend the image, "
                "run nnUNetv2_preprocess again, and continue the training with --c."
            )
        if self.trainer.grad_scaler is None and self.trainer.network.training:
            self._end_training(
                f": the loss wasn't finite in the maps {shorten(fault.parts)}, with the cases {shorten(fault.cases)}, "
                f"and nothing leaves out such a step on this device: the network is lost. {REMEDY}"
            )
        self.losses.append(fault)

    def _name_broken_label(self, batch: dict) -> None:
        labels = self.trainer.label_manager
        criterion = Criterion(labels.has_regions, labels.ignore_label)
        target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
        for case, segmentation in zip(names_of(batch), target.split(1), strict=True):
            try:
                criterion.check_values(segmentation, labels.num_segmentation_heads)
            except ValueError as error:
                self._end_training(
                    f", {case}: {error} Mend the segmentation or 'labels' in dataset.json, run "
                    "nnUNetv2_preprocess again, and continue the training with --c."
                )

    def report(self, phase: str, steps: int) -> None:
        """Log what wasn't finite at the end of an epoch's training or validation, on all ranks, and forget it.

        Raises:
            LoMixError: ``MOST_IN_A_ROW`` training steps one after the other were left out.
        """
        of_ranks: list[list[Fault]] = [self.losses]
        if self.trainer.is_ddp:
            of_ranks = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(of_ranks, self.losses)
        self.losses = []
        faults = [fault for of_rank in of_ranks for fault in of_rank]
        if faults:
            self._log(
                f": losses in {phase} that weren't finite: {len(faults)}; maps: "
                f"{shorten(name for fault in faults for name in fault.parts)}; cases: "
                f"{shorten(name for fault in faults for name in fault.cases)}."
            )
        left_out, longest_row = self._left_out, self._longest_row
        self._left_out = self._longest_row = 0
        if left_out:
            self._log(f": {left_out} of {steps} training steps were left out, as their gradients weren't finite.")
        if longest_row >= MOST_IN_A_ROW:
            self._end_training(
                f": {longest_row} training steps one after the other were left out, as their gradients weren't finite, "
                f"so the training was stopped. {REMEDY}"
            )

    def require_finite(self, filename: str) -> None:
        """Before a checkpoint is written.

        Raises:
            LoMixError: a parameter or a buffer of the network or its loss isn't finite.
        """
        modules = (self.trainer.network, self.trainer.loss)
        tensors = [named for m in modules for named in (*m.named_parameters(), *m.named_buffers())]
        broken = [name for name, t in tensors if not t.isfinite().all()]
        if broken:
            self._end_training(
                f": {shorten(broken)} of the network or its loss have values that aren't finite, so {filename} was not "
                f"written. {REMEDY}"
            )

    def _log(self, sentence: str) -> None:
        self.trainer.print_to_log_file(f"Epoch {self.trainer.current_epoch}{sentence}")

    def _end_training(self, sentence: str) -> NoReturn:
        self._log(sentence)
        raise LoMixError(f"Epoch {self.trainer.current_epoch}{sentence}")


def names_of(batch: dict) -> list[str]:
    """The cases of a batch; nnU-Net's own data loader names them."""
    return [str(key) for key in batch.get("keys", [f"sample {i} of the batch" for i in range(len(batch["data"]))])]
