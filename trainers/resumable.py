"""nnU-Net's trainer, made to be interrupted: by a signal, a kill, a full disk, or a second process in its folder.

- A training has its fold folder to itself.
- A checkpoint is written whole or not at all, ``checkpoint_latest.pth`` also by the clock, and once more on a signal.
- A training that goes on from there repeats no step and leaves none out.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.files import replacing, scratch
from nnunet_lomix.locks import Lock
from nnunet_lomix.nnunet.checkpoints import STATE
from nnunet_lomix.nnunet.results import LATEST
from nnunet_lomix.trainers.sentences import ends_with_a_sentence

# what schedulers send before they kill: SLURM SIGTERM, submitit one of the others; Windows has only the first
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
SECONDS_OF_ONE_SIGNAL = 1.0  # the scheduler and a command that is around this one may both send it
OUTPUTS = "train_outputs"  # in our state: what the finished steps of an unfinished epoch have returned
TORCH_CANT_WRITE = ("inline_container", "PytorchStreamWriter", "iostream")  # parts of what it says then


class ResumableTrainer(nnUNetTrainer):
    """nnU-Net's trainer, which loses little to a kill, and to a signal nothing.

    On SIGTERM, SIGUSR1 or SIGUSR2 the training ends after the step under way, with 128 + the signal's number as exit
    status and a checkpoint to continue from; another signal, more than a second later, ends it at once. With several
    GPUs rank 0 does this, and nnU-Net ends the others.

    Attributes:
        seconds_between_checkpoints: at the end of an epoch ``checkpoint_latest.pth`` is written if the last one is
            older than this, beside nnU-Net's own every 50 epochs. So this and one epoch is what a kill can cost.
    """

    seconds_between_checkpoints = 600.0

    # nnU-Net's, which are changed here
    num_iterations_per_epoch: int
    save_every: int
    train_step: Callable[[dict], dict]

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net wants its own signature
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._outputs_before: list[dict] = []  # of the steps of this epoch before an interruption
        self._outputs: list[dict] = []  # of the steps of this epoch since then
        self._last_saved = time.monotonic()
        self._signal: signal.Signals | None = None  # the first one that came
        self._signal_time = 0.0
        self._may_stop = False  # whether it ends the training at once, or later
        self._handlers: dict[int, Any] = {}  # those of others, while ours are there
        self._listening_process: int | None = None

    @property
    def finished_steps(self) -> int:
        """How many training steps of this epoch there have been, those before an interruption included."""
        return len(self._outputs_before) + len(self._outputs)

    @ends_with_a_sentence
    def run_training(self) -> None:
        with self._lock("training"):
            if self.local_rank == 0:
                for left in Path(self.output_folder).glob("checkpoint_*.pth.tmp*"):  # by a process that was killed
                    left.unlink(missing_ok=True)
            try:
                super().run_training()
            finally:
                self.stop_listening()
                self.__dict__.pop("train_step", None)  # the class's own is back
        if self._signal is not None and self.local_rank == 0:  # it came when there was nothing more to train
            self._exit(
                self._signal,
                "The training has ended, its validation hasn't begun: do that by the same command with --c.",
            )

    @ends_with_a_sentence
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with self._lock("validation"):
            super().perform_actual_validation(save_probabilities)

    def _lock(self, activity: str) -> Lock | nullcontext[None]:
        """The fold folder for this process alone; rank 0 has it for the others."""
        if self.local_rank != 0:
            return nullcontext()
        try:
            return Lock(Path(self.output_folder), activity)
        except OSError as error:
            raise LoMixError(f"{self.output_folder} can't be written ({error.strerror}).") from None

    def on_train_start(self) -> None:
        super().on_train_start()
        # set on this object, so that it is around what any subclass has made of the method
        self.train_step = self._uninterrupted(self.train_step)
        self._last_saved = time.monotonic()
        self._listen()

    def on_epoch_start(self) -> None:
        self._let_signals_stop()  # one that came at the end of the last epoch
        self._may_stop = False
        self._outputs = []  # there are some where a training was stopped by an error, and is started again
        super().on_epoch_start()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        # how many steps are left; nnU-Net asks after this
        self._steps = self.num_iterations_per_epoch
        self.num_iterations_per_epoch = max(0, self._steps - len(self._outputs_before))
        self._let_signals_stop()

    def _uninterrupted(self, train_step: Callable[[dict], dict]) -> Callable[[dict], dict]:
        """The method ``train_step``, after which a signal may end the training, but not meanwhile."""

        @wraps(train_step)
        def wrapped(batch: dict) -> dict:
            self._may_stop = False
            output = train_step(batch)
            self._outputs.append(output)
            self._let_signals_stop()
            return output

        return wrapped

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        self._may_stop = False
        self.num_iterations_per_epoch = self._steps
        super().on_train_epoch_end([*self._outputs_before, *train_outputs])

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._let_signals_stop()

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        self._may_stop = False
        super().on_validation_epoch_end(val_outputs)

    def on_epoch_end(self) -> None:
        self._outputs_before, self._outputs = [], []
        # nnU-Net writes the latest checkpoint before it knows whether this is the best epoch, and a training that goes
        # on from there wouldn't know, either: so this is done here, afterwards
        save_every, self.save_every = self.save_every, self.num_epochs + 1
        try:
            super().on_epoch_end()
        finally:
            self.save_every = save_every
        too_old = time.monotonic() - self._last_saved > self.seconds_between_checkpoints
        if (self.current_epoch % save_every == 0 or too_old) and self.current_epoch < self.num_epochs:
            self._save_latest()

    def _save_latest(self) -> None:
        """Write ``checkpoint_latest.pth``, with as many epochs as have ended, and the steps of this one."""
        self.current_epoch -= 1  # nnU-Net writes one more, as it does that before it counts the epoch
        try:
            self.save_checkpoint(os.path.join(self.output_folder, LATEST))
        finally:
            self.current_epoch += 1
        self._last_saved = time.monotonic()

    @ends_with_a_sentence
    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with our state, written in one stroke: a crash leaves the old file whole."""
        if self.local_rank != 0:  # writes nothing in nnU-Net either, and must not remove the files of rank 0
            return
        try:
            with replacing(filename) as whole, scratch(whole) as stock:
                super().save_checkpoint(str(stock))
                if not stock.exists():  # checkpointing is disabled
                    return
                checkpoint = torch.load(stock, map_location="cpu", mmap=True, weights_only=False)
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
        """Add ours to what nnU-Net saves; a subclass may add more.

        Args:
            checkpoint: nnU-Net's, with copies of what the trainer has.
        """
        # an epoch that hasn't ended is logged anew; of all others there is one entry each
        ended = checkpoint["current_epoch"]
        checkpoint["logging"] = {
            key: value[:ended] if isinstance(value, list) else value for key, value in checkpoint["logging"].items()
        }
        outputs = [*self._outputs_before, *self._outputs]
        # without arrays of numpy, a checkpoint can be read by torch's safe loading
        checkpoint[STATE] = {OUTPUTS: [{k: _as_tensor(v) for k, v in output.items()} for output in outputs]}

    @ends_with_a_sentence
    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        checkpoint = filename_or_checkpoint
        if isinstance(checkpoint, str):
            checkpoint = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=False)
        self.load_state(checkpoint)

    def load_state(self, checkpoint: dict) -> None:
        """The counterpart of :meth:`add_state`; the checkpoint may be of a trainer that has no state of ours."""
        outputs = (checkpoint.get(STATE) or {}).get(OUTPUTS, [])
        self._outputs_before = [{k: _as_array(v) for k, v in output.items()} for output in outputs]
        self._outputs = []

    def _listen(self) -> None:
        """From now on our signals end the training as described above."""
        self._listening_process = os.getpid()
        try:
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        except ValueError:  # not in the main thread, where alone Python allows it
            self.print_to_log_file("Signals end this training without a checkpoint, as it isn't in the main thread.")

    def stop_listening(self) -> None:
        self._may_stop = False
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if os.getpid() != self._listening_process:  # a worker that was forked meanwhile: as if we weren't there
            _end_at_once(number)
        elif self._signal is None:
            self._signal, self._signal_time = signal.Signals(number), now
            if self._may_stop:
                self._stop(self._signal)
        elif now - self._signal_time > SECONDS_OF_ONE_SIGNAL:
            _end_at_once(number)

    def _let_signals_stop(self) -> None:
        """From here on a signal ends the training at once, and so does one that has come before; on rank 0 alone."""
        self._may_stop = self.local_rank == 0
        if self._may_stop and self._signal is not None:
            self._stop(self._signal)

    def _stop(self, number: signal.Signals) -> NoReturn:
        self._may_stop = False
        # torch sends an interrupt to the ranks when their parent has died
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._save_latest()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
        saved = "no checkpoint was written, as these are disabled"
        if not self.disable_checkpointing:
            saved = "nothing is lost: continue by the same command with --c"
        place = f"epoch {self.current_epoch} after {self.finished_steps} steps"
        self._exit(number, f"The training has stopped in {place}; {saved}.")

    def _exit(self, number: signal.Signals, sentence: str) -> NoReturn:
        self.print_to_log_file(f"{number.name}: {sentence}")
        raise SystemExit(128 + number)


def _end_at_once(number: int) -> None:
    """What the signal does to a process that doesn't handle it."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _as_array(value: Any) -> Any:
    return value.clone().numpy() if isinstance(value, torch.Tensor) else value
