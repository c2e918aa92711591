"""Trainings on this machine: one at a time on each GPU, or some at a time without one."""

import os
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments.display import Display
from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.job import finish, start
from nnunet_lomix.experiments.preparation import Preparation
from nnunet_lomix.experiments.training import Record, Training

SECONDS_BETWEEN_POLLS = 0.5
Running = tuple[Training, "subprocess.Popen[bytes]"]
VISIBLE = "CUDA_VISIBLE_DEVICES"


def choose_device() -> str:
    """CUDA, MPS or CPU: the first of them that there is."""
    import torch  # slow to import

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class ThisMachine:
    """Runs trainings side by side, each in a slot.

    Args:
        experiment: its trainings; with a device.

    Attributes:
        slots: variables for each training that can run at the same time.

    Raises:
        LoMixError: there is no GPU.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.slots = [{VISIBLE: gpu} for gpu in _list_gpus(experiment)] or [{} for _ in range(experiment.jobs)]

    def run(self, trainings: Sequence[Training], preparations: Sequence[Preparation], console: Console) -> None:
        """Until all have ended; an interrupt ends those that run, and ours save themselves.

        Raises:
            LoMixError: planning or preprocessing failed, or there was an interrupt.
        """
        try:
            for preparation in preparations:
                for command in preparation.list_commands():
                    console.print(shlex.join(command), highlight=False, soft_wrap=True)
                preparation.run(Path(self.experiment.out) / "logs" / f"{preparation.dataset}.log")
            with Display(self.experiment, console) as display:
                self._run(trainings, display, console)
        except KeyboardInterrupt:
            raise LoMixError("Interrupted: nothing runs any more, and the same command goes on from here.") from None

    def _run(self, trainings: Sequence[Training], display: Display, console: Console) -> None:
        waiting = deque(trainings)
        running: dict[int, Running] = {}
        try:
            while waiting or running:
                for slot, variables in enumerate(self.slots):
                    if waiting and slot not in running:
                        training = waiting.popleft()
                        Record.of(training, Path(self.experiment.out)).remove()
                        running[slot] = training, start(training, self.experiment, variables)
                time.sleep(SECONDS_BETWEEN_POLLS)
                for slot, (training, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        finish(training, self.experiment, process)
                display.refresh()
        finally:
            self._stop(list(running.values()), console)

    def _stop(self, running: Sequence[Running], console: Console) -> None:
        """End trainings and wait until ours have saved themselves, however often the user presses Ctrl-C."""
        if not running:
            return
        console.print(f"Ending {len(running)} trainings; ours save themselves first.", highlight=False)
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for _, process in running:
                process.terminate()
            for training, process in running:
                process.wait()
                finish(training, self.experiment, process)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _list_gpus(experiment: Experiment) -> Sequence[str]:
    """Those that the experiment names, or else all that CUDA may use; none for another device."""
    if experiment.device != "cuda" or experiment.gpus:
        return experiment.gpus
    import torch  # slow to import

    visible = [gpu for gpu in os.environ.get(VISIBLE, "").split(",") if gpu]
    gpus = visible or [str(number) for number in range(torch.cuda.device_count())]
    if not gpus or not torch.cuda.is_available():
        raise LoMixError("There is no GPU here that CUDA can use: give the device cpu or mps, or options of SLURM.")
    return gpus
