"""What all our trainers are made of: nnU-Net's trainer, which survives interruptions and numbers that aren't finite."""

import os
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_lomix.errors import LoMixError, describe, explaining
from nnunet_lomix.files import replacing, scratch
from nnunet_lomix.locks import Lock
from nnunet_lomix.nnunet.checkpoints import read_checkpoint
from nnunet_lomix.nnunet.datasets import SPLITS, read_splits, require_root
from nnunet_lomix.nnunet.internals import end_data_loaders
from nnunet_lomix.nnunet.results import LATEST
from nnunet_lomix.trainers.faults import Faults, UnitScaler
from nnunet_lomix.trainers.signals import StopSignals

TORCH_CANT_WRITE = ("inline_container", "PytorchStreamWriter", "iostream")  # parts of what it says then


@contextmanager
def ending_with_a_sentence() -> Iterator[None]:
    """What a user can mend ends nnU-Net's command with its sentence, not with a traceback.

    Decorates what that command calls: a look-up, the making of a trainer, ``initialize``, ``load_checkpoint``,
    ``run_training`` and ``perform_actual_validation``.
    """
    try:
        yield
    except LoMixError as error:
        raise SystemExit(str(error)) from None


class BaseTrainer(nnUNetTrainer):
    """nnU-Net's trainer, which loses little when it is interrupted, and never trains or saves NaN without a word.

    A training has its fold folder to itself. A checkpoint is written whole or not at all. What an interruption costs:

    - SIGTERM, SIGUSR1 or SIGUSR2: the time since the epoch under way began. The step under way ends, a checkpoint is
      written, and the exit status is 128 + the signal's number. With ``--c`` the epoch begins anew, with the weights
      as they are: nothing that was learned is lost, and its steps are made once more. With several GPUs rank 0 does
      this, and nnU-Net ends the others. Another signal, more than a second later, ends the training at once.
    - a kill, or a machine that vanishes: what was trained since the last checkpoint, at most
      ``seconds_between_checkpoints`` and one epoch.

    A step whose gradients aren't finite is left out, also on a CPU, and the log says so
    (:mod:`~nnunet_lomix.trainers.faults`).

    Attributes:
        epochs: length of the training; None for nnU-Net's default.
        seconds_between_checkpoints: at the end of an epoch ``checkpoint_latest.pth`` is written if the last one is
            older than this, beside nnU-Net's own every 50 epochs.
    """

    epochs: int | None = None
    seconds_between_checkpoints = 600.0
    grad_scaler: torch.amp.GradScaler | None  # nnU-Net's
    faults: Faults  # -> self.initialize

    @ending_with_a_sentence()  # type: ignore[misc]
    @wraps(nnUNetTrainer.__init__)  # nnU-Net looks for the names of its own parameters
    def __init__(self, plans: dict, configuration: str, *args: Any, **kwargs: Any):
        for variable in ("nnUNet_preprocessed", "nnUNet_results"):
            require_root(variable)
        self.check(PlansManager(plans).get_configuration(configuration))
        super().__init__(plans, configuration, *args, **kwargs)
        if self.epochs is not None:
            self.num_epochs = self.epochs
        self._signals = StopSignals()
        self._cases: list[str] = []  # of the fold, once they are known
        self._last_saved = time.monotonic()

    def check(self, configuration: ConfigurationManager) -> None:
        """Refuse what this class can't train, before anything is written; a subclass may refuse more.

        Raises:
            LoMixError: it can't.
        """
        if self.epochs is not None:
            self._require_number("epochs", whole=True, least=1)
        self._require_number("seconds_between_checkpoints")

    def _require_number(self, setting: str, whole: bool = False, least: float = 0) -> None:
        """Refuse an attribute that isn't a number, a whole one or at least so large, by a LoMixError."""
        value = getattr(self, setting)
        kind: Any = Integral if whole else Real
        if isinstance(value, bool) or not isinstance(value, kind) or not value >= least:
            what = "a whole number" if whole else "a number"
            raise LoMixError(f"{type(self).__name__}: {setting} must be {what} from {least} on, not {value!r}.")

    def initialize(self) -> None:
        super().initialize()
        if self.grad_scaler is None and self.device.type == "cpu":
            self.grad_scaler = UnitScaler()
        self.faults = Faults(self, self.parts_not_finite)

    def parts_not_finite(self) -> list[str]:
        """Which parts of the last loss weren't finite, by name; a subclass may know more."""
        return ["the loss"]

    @ending_with_a_sentence()
    def run_training(self) -> None:
        with self._lock("training"), self._signals, self._naming_broken_cases():
            if self.local_rank == 0:
                for left in Path(self.output_folder).glob("checkpoint_*.pth.tmp*"):  # by a process that was killed
                    left.unlink(missing_ok=True)
            if not self._signals.can_listen():
                self.print_to_log_file("Signals end this training without a checkpoint: it isn't in the main thread.")
            self._last_saved = time.monotonic()
            try:
                super().run_training()
            except RuntimeError:
                # a scheduler ends the data loaders, too, and other ranks; without them a step fails
                self._stop_on_signal()
                raise
            self._stop_on_signal(ended=True)

    @ending_with_a_sentence()
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with self._lock("validation"), self._naming_broken_cases():
            super().perform_actual_validation(save_probabilities)

    def do_split(self) -> tuple[list[str], list[str]]:
        folder = Path(self.preprocessed_dataset_folder_base)
        if self.fold != "all" and (folder / SPLITS).is_file():
            read_splits(folder)  # nnU-Net's error for a damaged file doesn't name it
        training, validation = super().do_split()
        self._cases = [*training, *validation]
        return training, validation

    @contextmanager
    def _naming_broken_cases(self) -> Iterator[None]:
        """Where nnU-Net's code fails and a preprocessed case can't be opened, end with that case's name.

        Its data loaders fail in processes of their own, and what comes from there names no file.
        """
        try:
            yield
        except LoMixError:
            raise
        except Exception:
            folder, previous = self.preprocessed_dataset_folder, self.folder_with_segs_from_previous_stage
            for case in self._cases:
                with explaining(f"{case} in {folder} can't be read, so run nnUNetv2_preprocess again"):
                    self.dataset_class(folder, [case], previous).load_case(case)
            raise

    def _lock(self, activity: str) -> Lock | nullcontext[None]:
        """The fold folder for this process alone; rank 0 has it for the others."""
        if self.local_rank != 0:
            return nullcontext()
        try:
            return Lock(Path(self.output_folder), activity)
        except OSError as error:
            raise LoMixError(f"{self.output_folder} can't be written ({error.strerror}).") from None

    def _stop_on_signal(self, ended: bool = False) -> None:
        """Where a signal has come, write a checkpoint and end the process; rank 0 does it for the others."""
        number = self._signals.received
        if number is None or self.local_rank != 0:
            return
        if ended:
            sentence = "The training has ended, its validation hasn't begun: do that by the same command with --c."
        else:
            self._save_latest()
            saved = "it begins anew, with the weights as they are: continue by the same command with --c"
            if self.disable_checkpointing:
                saved = "no checkpoint was written, as these are disabled"
            sentence = f"The training has stopped in epoch {self.current_epoch}; {saved}."
        self.print_to_log_file(f"{number.name}: {sentence}")
        with suppress(Exception):  # the sentence and the exit status are what counts
            end_data_loaders(self)
        raise SystemExit(128 + number)

    def on_epoch_start(self) -> None:
        self._stop_on_signal()
        super().on_epoch_start()

    def train_step(self, batch: dict) -> dict:
        # before a step, not behind one: what a subclass does behind its step belongs to it
        self._stop_on_signal()
        result = self.faults.watch(super().train_step, batch)
        self.faults.note_step()
        return result

    def validation_step(self, batch: dict) -> dict:
        self._stop_on_signal()
        return self.faults.watch(super().validation_step, batch)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        self.faults.report("training", len(train_outputs))

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        self.faults.report("validation", len(val_outputs))

    def on_epoch_end(self) -> None:
        before = self._last_saved
        super().on_epoch_end()
        is_old = time.monotonic() - before > self.seconds_between_checkpoints
        # nnU-Net writes its own before it knows whether this is the best epoch, and a training that goes on from there
        # wouldn't know, either: so it is written once more
        if (is_old or self._last_saved != before) and self.current_epoch < self.num_epochs:
            self._save_latest()

    def _save_latest(self) -> None:
        self.save_checkpoint(os.path.join(self.output_folder, LATEST))

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with our state, written in one stroke: a crash leaves the old file whole.

        Raises:
            LoMixError: the network or its loss isn't finite, or the disk is full.
        """
        if self.local_rank != 0:  # writes nothing in nnU-Net either, and must not remove the files of rank 0
            return
        if os.path.basename(filename) == LATEST:
            self._last_saved = time.monotonic()
        self.faults.require_finite(filename)
        try:
            with replacing(filename) as whole, scratch(whole) as stock:
                super().save_checkpoint(str(stock))
                if not stock.exists():  # checkpointing is disabled
                    return
                checkpoint = torch.load(stock, map_location="cpu", mmap=True, weights_only=False)
                _forget_unfinished_epoch(checkpoint)
                self.add_state(checkpoint)
                torch.save(checkpoint, whole)
                del checkpoint  # Windows removes no file that is mapped
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(part in str(error) for part in TORCH_CANT_WRITE):
                raise
            reason = error.strerror if isinstance(error, OSError) else "most likely no space is left on its disk"
            old = "the one that was there is intact" if os.path.exists(filename) else "there was none before"
            raise LoMixError(
                f"{filename} could not be written ({reason or error}); {old}. Make room, and continue with --c."
            ) from None

    def add_state(self, checkpoint: dict) -> None:
        """Add to what nnU-Net saves, a copy of what the trainer has; for subclasses."""

    @ending_with_a_sentence()
    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        file = filename_or_checkpoint
        checkpoint = read_checkpoint(file, trusted=True)
        if not self.was_initialized:
            self.initialize()
        try:
            super().load_checkpoint(file)
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            reason = textwrap.shorten(describe(error), 200)  # torch lists all keys of a network
            raise LoMixError(
                f"{file} was written by {checkpoint['trainer_name']} and doesn't fit {type(self).__name__} with these "
                f"plans ({reason}): continue it as it was written, or start a new training without --c."
            ) from None
        self.load_state(checkpoint)

    def load_state(self, checkpoint: dict) -> None:
        """Take over what :meth:`add_state` has added, if it is there; for subclasses, behind nnU-Net's part.

        Raises:
            LoMixError: it isn't what this trainer can go on with.
        """


def _forget_unfinished_epoch(checkpoint: dict) -> None:
    """Have a checkpoint of nnU-Net's, written at any time, say that the epoch under way hasn't begun."""
    log = checkpoint["logging"]
    ended = len(log["epoch_end_timestamps"])
    checkpoint["current_epoch"] = ended
    checkpoint["logging"] = {key: value[:ended] if isinstance(value, list) else value for key, value in log.items()}
