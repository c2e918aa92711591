"""Numerical faults: a step that isn't finite is left out, counted and named; what can't go on ends with a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor
from torch import distributed as dist

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.trainers.sentences import ends_with_a_sentence

# Left out one after the other; a gradient scaler needs 16 to come from its first scale, 2^16, down to 1.
MOST_IN_A_ROW = 25
MOST_NAMES = 5  # of maps, or of cases, in a sentence
REMEDY = (
    "Continue from the last checkpoint with --c; if it happens again, give a subclass of the trainer a lower "
    "initial_lr, or operators without 'multiply', whose products of logits grow fastest."
)


class Fault(NamedTuple):
    """A loss that wasn't finite: the maps in which it wasn't, or the anchor, and all cases of the batch, by name."""

    maps: list[str]
    cases: list[str]


class UnitScaler(torch.amp.GradScaler):
    """For a CPU, where nnU-Net has no gradient scaler: leaves out a step whose gradients aren't finite, as on CUDA.

    Its scale is 1 at the start of each step, so all other steps are what they are without it.
    """

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=1.0, growth_interval=2**31 - 1)

    def restore(self) -> None:
        """The scale of the next step."""
        self.update(1.0)

    def state_dict(self) -> None:  # type: ignore[override]
        """Nothing, as nnU-Net writes on a CPU: on CUDA the training goes on with the scale that it has there."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the scale of 1 where a training from CUDA is continued."""


class SkippedSteps:
    """Counts the steps that the gradient scaler left out, on the device, so that no step waits for it."""

    def __init__(self, device: torch.device):
        self.total, self.in_a_row, self.longest_row = torch.zeros(3, dtype=torch.int64, device=device)

    def note(self, skipped: Tensor) -> None:
        """Count a step; ``skipped`` is a bool, ``()``."""
        # in place: a step in a CUDA graph counts, too
        self.total += skipped
        self.in_a_row.add_(1).mul_(skipped)
        torch.maximum(self.longest_row, self.in_a_row, out=self.longest_row)

    def read(self) -> tuple[int, int]:
        """How many there were since this was last asked, and the length of the longest row of them."""
        total, longest_row = torch.stack([self.total, self.longest_row]).tolist()
        self.total.zero_()
        self.longest_row.zero_()
        return total, longest_row


class FiniteTrainer(nnUNetTrainer):
    """nnU-Net's trainer, which never trains or saves a network that isn't finite without a word.

    A step whose gradients aren't finite is left out, also on a CPU. What was left out is in the log of the training,
    and so is a loss that wasn't finite, with its maps and cases. An image that isn't finite ends the training, and so
    do MOST_IN_A_ROW faults one after the other, and a checkpoint of a network that isn't finite.
    """

    grad_scaler: torch.amp.GradScaler | None

    def initialize(self) -> None:
        super().initialize()
        if self.grad_scaler is None and self.device.type == "cpu":
            self.grad_scaler = UnitScaler()
        self.skipped = SkippedSteps(self.device)
        self.faults: list[Fault] = []  # of the present epoch
        self.faults_in_a_row = 0

    def gradient_scale(self) -> Tensor:
        """What the gradients of the next step are multiplied by, ``()``, on the device."""
        one = torch.ones((), device=self.device)
        return one if self.grad_scaler is None else self.grad_scaler.scale(one)

    def note_step(self, scale: Tensor) -> None:
        """Count a step that was left out; ``scale`` is :meth:`gradient_scale` before it."""
        self.skipped.note(self.gradient_scale() < scale)  # a scaler that leaves out a step reduces its scale
        if isinstance(self.grad_scaler, UnitScaler):
            self.grad_scaler.restore()

    @ends_with_a_sentence
    def train_step(self, batch: dict) -> dict:
        scale = self.gradient_scale()
        with self._naming_broken_targets(batch):
            result = super().train_step(batch)
        self.note_step(scale)
        if self._note_fault(result["loss"], batch):
            self.faults_in_a_row += 1
            self._end_after_too_many_faults()
        else:
            self.faults_in_a_row = 0
        return result

    @ends_with_a_sentence
    def validation_step(self, batch: dict) -> dict:
        with self._naming_broken_targets(batch):
            result = super().validation_step(batch)
        self._note_fault(result["loss"], batch)
        return result

    @ends_with_a_sentence
    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        self._log_faults("training")
        skipped, longest_row = self.skipped.read()
        if skipped:
            self.print_to_log_file(
                f"Epoch {self.current_epoch}: {skipped} of {len(train_outputs)} training steps were left out, as their "
                "gradients weren't finite."
            )
        if longest_row >= MOST_IN_A_ROW:
            self._end_training(
                f"Epoch {self.current_epoch}: the gradients of {longest_row} training steps one after the other "
                f"weren't finite, though their losses may have been, so the training was stopped. {REMEDY}"
            )

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        self._log_faults("validation")

    @ends_with_a_sentence
    def save_checkpoint(self, filename: str) -> None:
        tensors: dict[str, Tensor] = {}
        for module in (self.network, self.loss):
            tensors |= dict([*module.named_parameters(), *module.named_buffers()])
        broken = [name for name, t in tensors.items() if not t.isfinite().all()]
        if broken:
            self._end_training(
                f"Epoch {self.current_epoch}: {some(broken)} of the network or its loss have values that aren't "
                f"finite, so {filename} was not written. {REMEDY}"
            )
        super().save_checkpoint(filename)

    def _note_fault(self, loss: np.ndarray, batch: dict) -> bool:
        """Whether a loss isn't finite; it is on the host already, as nnU-Net's steps give it.

        Raises:
            LoMixError: an image isn't finite, so that each of its steps would be left out.
        """
        if np.isfinite(loss).all():
            return False
        cases = names_of(batch)
        finite = batch["data"].isfinite().flatten(1).all(1).tolist()
        broken = [case for case, is_finite in zip(cases, finite, strict=True) if not is_finite]
        if broken:
            self._end_training(
                f"Epoch {self.current_epoch}: the preprocessed image of {some(broken)} has values that are NaN or "
                "infinite: mend the image, run nnUNetv2_preprocess again, and continue the training with --c."
            )
        self.faults.append(Fault(self.loss.maps_not_finite() or ["the anchor"], cases))
        return True

    @contextmanager
    def _naming_broken_targets(self, batch: dict) -> Iterator[None]:
        """Where a step fails and a label of the batch is the reason, end the training with the name of the case."""
        try:
            yield
        except (ValueError, RuntimeError):  # of the loss, or of a GPU, whose step doesn't look at every label
            target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
            for case, segmentation in zip(names_of(batch), target.split(1), strict=True):
                try:
                    self.loss.criterion.check_values(segmentation, self.loss.num_classes)
                except ValueError as error:
                    self._end_training(
                        f"Epoch {self.current_epoch}, {case}: {error} Mend the segmentation or 'labels' in "
                        "dataset.json, run nnUNetv2_preprocess again, and continue the training with --c."
                    )
            raise

    def _end_after_too_many_faults(self) -> None:
        # without a scaler nothing left the step out: the network is lost
        if self.faults_in_a_row < (1 if self.grad_scaler is None else MOST_IN_A_ROW):
            return
        self._end_training(
            f"Epoch {self.current_epoch}: the loss wasn't finite, {self.faults_in_a_row} times one after the other, so "
            f"the training was stopped; the last time in the maps {some(self.faults[-1].maps)}, with the cases "
            f"{some(self.faults[-1].cases)}. {REMEDY}"
        )

    def _end_training(self, sentence: str) -> NoReturn:
        """End the training with a sentence, which is in its log, too."""
        self.print_to_log_file(sentence, also_print_to_console=False)
        raise LoMixError(sentence)

    def _log_faults(self, phase: str) -> None:
        """Log the faults of all ranks, and forget them."""
        of_ranks: list[list[Fault]] = [self.faults]
        if self.is_ddp:
            of_ranks = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(of_ranks, self.faults)
        self.faults = []
        faults = [fault for of_rank in of_ranks for fault in of_rank]
        if faults:
            self.print_to_log_file(
                f"Epoch {self.current_epoch}: losses in {phase} that weren't finite: {len(faults)}; maps: "
                f"{some([name for fault in faults for name in fault.maps])}; cases: "
                f"{some([name for fault in faults for name in fault.cases])}."
            )


def names_of(batch: dict) -> list[str]:
    """The cases of a batch; nnU-Net's own data loader names them."""
    return [str(key) for key in batch.get("keys", [f"sample {i} of the batch" for i in range(len(batch["data"]))])]


def some(names: list[str]) -> str:
    """The first of some names, each once, and how many more there are.

    >>> some(["z_0", "z_1", "z_0"])
    'z_0, z_1'
    >>> some([f"z_{j}" for j in range(7)])
    'z_0, z_1, z_2, z_3, z_4 and 2 more'
    """
    names = list(dict.fromkeys(names))
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
