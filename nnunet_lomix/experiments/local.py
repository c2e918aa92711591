"""Trainings on this machine: one at a time on each GPU, or some at a time without one."""

import os
import signal
import subprocess
import time
from collections import deque
from functools import cached_property

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments import SCHEDULERS
from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.job import finish, start
from nnunet_lomix.experiments.machine import Machine
from nnunet_lomix.experiments.preparation import Todo
from nnunet_lomix.experiments.training import States, Training

SECONDS_BETWEEN_POLLS = 0.5
SECONDS_BETWEEN_STATES = 2
VISIBLE = "CUDA_VISIBLE_DEVICES"


class ThisMachine(Machine):
    """Runs trainings side by side, each in a slot."""

    interrupted = "Interrupted: nothing runs any more, and the same command goes on from here."

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self._waiting: deque[Training] = deque()
        self._running: dict[int, tuple[Training, subprocess.Popen[bytes]]] = {}  # by slot

    @cached_property
    def device(self) -> str:
        if self.experiment.device or self.experiment.gpus:
            return self.experiment.device or "cuda"
        import torch  # slow to import

        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"

    @cached_property
    def slots(self) -> list[dict[str, str]]:
        """Variables for each training that can run at the same time; a LoMixError if there is no GPU."""
        if self.device != "cuda":
            return [{} for _ in range(self.experiment.jobs)]
        return [{VISIBLE: gpu} for gpu in self.experiment.gpus or _list_gpus()]

    def check(self, dry_run: bool) -> None:
        if self.device != "cuda" or dry_run:
            return
        there = _list_gpus()
        # by number only what this process sees can be told; a name or a variable may mean another GPU
        beyond = [gpu for gpu in self.experiment.gpus if gpu.isdecimal() and gpu not in there]
        if beyond and VISIBLE not in os.environ:
            raise LoMixError(f"There is no GPU {', '.join(beyond)} here, but {', '.join(there)}: give these as gpus.")

    def submit(self, todo: Todo) -> None:
        for preparation in todo.preparations:
            preparation.run()
        self._waiting.extend(todo.ready)

    def is_busy(self, states: States) -> bool:
        return bool(self._waiting or self._running)

    def wait(self) -> None:
        end = time.monotonic() + SECONDS_BETWEEN_STATES
        while True:
            for slot, variables in enumerate(self.slots):
                if self._waiting and slot not in self._running:
                    training = self._waiting.popleft()
                    training.note.unlink(missing_ok=True)
                    self._running[slot] = training, start(training, self.options, variables)
            time.sleep(SECONDS_BETWEEN_POLLS)
            for slot, (training, process) in list(self._running.items()):
                if process.poll() is not None:
                    del self._running[slot]
                    finish(training, process)
            if not self.is_busy({}) or time.monotonic() > end:
                return

    def stop(self) -> None:
        """End trainings and wait until ours have saved themselves, however often the user presses Ctrl-C."""
        running = list(self._running.values())
        if not running:
            return
        what = "the training" if len(running) == 1 else f"{len(running)} trainings"
        print(f"Ending {what}; ours save themselves first.", flush=True)
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for _, process in running:
                process.terminate()
            for training, process in running:
                process.wait()
                finish(training, process)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def variables(self, number: int) -> dict[str, str]:
        return self.slots[number % len(self.slots)]


def _list_gpus() -> list[str]:
    """All that CUDA may use; a LoMixError if there is none."""
    import torch  # slow to import

    visible = [gpu for gpu in os.environ.get(VISIBLE, "").split(",") if gpu]
    gpus = visible or [str(number) for number in range(torch.cuda.device_count())]
    if not gpus or not torch.cuda.is_available():
        other = f"the device cpu or mps, or options of {' or '.join(map(str.upper, SCHEDULERS))}"
        raise LoMixError(f"There is no GPU here that CUDA can use: give {other}.")
    return gpus
