"""Trainings on this machine: one at a time on each GPU, or some at a time without one."""

import os
import shlex
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
from nnunet_lomix.experiments.training import Training

SECONDS_BETWEEN_POLLS = 0.5
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
                for command in preparation.commands:
                    console.print(shlex.join(command), highlight=False, soft_wrap=True)
                preparation.run(Path(self.experiment.out) / "logs" / f"{preparation.dataset}.log")
            with Display(self.experiment, console) as display:
                self._run(trainings, display)
        except KeyboardInterrupt:
            raise LoMixError("Interrupted: nothing runs any more, and the same command goes on from here.") from None

    def _run(self, trainings: Sequence[Training], display: Display) -> None:
        waiting = deque(trainings)
        running: dict[int, tuple[Training, subprocess.Popen[bytes]]] = {}
        try:
            while waiting or running:
                for slot, variables in enumerate(self.slots):
                    if waiting and slot not in running:
                        training = waiting.popleft()
                        running[slot] = training, start(training, self.experiment, variables)
                time.sleep(SECONDS_BETWEEN_POLLS)
                for slot, (training, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        finish(training, self.experiment, process)
                display.refresh()
        finally:
            for _, process in running.values():
                process.terminate()
            for training, process in running.values():
                process.wait()
                finish(training, self.experiment, process)


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
