"""Trainings as a job array of SLURM, by submitit."""

import getpass
import os
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments.display import Display
from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.job import INTERRUPTED, finish, start
from nnunet_lomix.experiments.preparation import Preparation
from nnunet_lomix.experiments.training import Record, State, Training, log_file, read_state
from nnunet_lomix.nnunet.datasets import VARIABLES
from nnunet_lomix.nnunet.registration import VARIABLE

SECONDS_BETWEEN_POLLS = 0.5
SECONDS_BETWEEN_QUEUES = 10  # SLURM doesn't like to be asked often
LARGEST_ARRAY = 1000  # SLURM's default limit is one more
# what submitit itself reads; all others are sbatch's own
OF_SUBMITIT = ("array_parallelism", "setup", "signal_delay_s", "srun_args", "stderr_to_stdout", "teardown", "use_srun")
LISTS = ("setup", "srun_args", "teardown")  # of these
REQUEUES = 1000  # by submitit, after the time limit: a long training may need many
SIGNAL_DELAY = 120  # seconds before the time limit in which a training saves itself
# options that ask for GPUs, which preprocessing doesn't need
FOR_GPUS = ("gpus", "gres", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "cpus-per-gpu", "mem-per-gpu")


@dataclass
class PreparationJob:
    """Planning and preprocessing of one dataset on a node."""

    preparation: Preparation
    log: Path

    def __call__(self) -> None:
        self.preparation.run(self.log)

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit before the time limit: begin again."""
        return DelayedSubmission(self)


@dataclass
class TrainingJob:
    """One training on a node; the job is started again with the same object after it has been requeued.

    Attributes:
        training, experiment: which; the experiment has a device.
        variables: those of nnU-Net where the experiment was started: a cluster may not hand them on.
    """

    training: Training
    experiment: Experiment
    variables: dict[str, str]
    process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    def __call__(self) -> None:
        if read_state(self.training, Path(self.experiment.out)) is State.DONE:  # requeued at the last moment
            return
        self.process = start(self.training, self.experiment, self.variables)
        while self.process.poll() is None:
            time.sleep(SECONDS_BETWEEN_POLLS)
        if self.process.returncode in INTERRUPTED:
            time.sleep(10)  # the same signal comes to this process, too, and calls checkpoint, or SLURM ends it
        finish(self.training, self.experiment, self.process)
        if self.process.returncode:
            log = log_file(self.training, Path(self.experiment.out))
            raise LoMixError(f"{self.training.name} did not end; its log is {log}.")  # so SLURM's job has failed, too

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit before the time limit: the training saves itself, and the job comes back."""
        if self.process is not None:
            # the training has had this signal from SLURM, too; this is for clusters that signal one process alone
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGUSR2)
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(TrainingJob(self.training, self.experiment, self.variables))


class Slurm:
    """Puts trainings into SLURM's queue, and waits for them.

    Args:
        experiment: its trainings; with a device and options of sbatch.

    Attributes:
        slots: none; SLURM chooses where a training runs.

    Raises:
        LoMixError: SLURM's commands aren't there.
    """

    slots: Sequence[dict[str, str]] = ()

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.options = dict(experiment.slurm or {})
        self.folder = Path(experiment.out) / "slurm"
        self._make_executor(self.options)

    def run(self, trainings: Sequence[Training], preparations: Sequence[Preparation], console: Console) -> None:
        """Submit, and wait until SLURM has no job of the experiment any more; an interrupt ends the waiting alone.

        Raises:
            LoMixError: SLURM doesn't take the jobs, or there was an interrupt.
        """
        if trainings:
            jobs = self.submit(trainings, [p for p in preparations if p.commands])
            console.print(f"SLURM has taken {len(jobs)} jobs: {jobs[0]} to {jobs[-1]}.", highlight=False)
        try:
            with Display(self.experiment, console, SECONDS_BETWEEN_QUEUES) as display:
                while {State.QUEUED, State.RUNNING} & set(display.states.values()):
                    time.sleep(SECONDS_BETWEEN_POLLS)
                    display.refresh()
        except KeyboardInterrupt:
            raise LoMixError(
                "SLURM's jobs go on without this command: run it again to wait for them and for the report, look "
                "with nnunet_lomix status, and end them with scancel."
            ) from None

    def submit(self, trainings: Sequence[Training], preparations: Sequence[Preparation]) -> list[str]:
        """Submit trainings, as arrays that wait until everything is prepared.

        Returns:
            The jobs, as squeue names them.

        Raises:
            LoMixError: SLURM doesn't take them.
        """
        out = Path(self.experiment.out)
        variables = {name: os.environ[name] for name in (*VARIABLES, VARIABLE) if name in os.environ}
        options = self.options
        jobs: list[str] = []
        try:
            if preparations:
                on_cpu = {k: v for k, v in options.items() if k.replace("_", "-") not in FOR_GPUS}
                first = [PreparationJob(p, out / "logs" / f"{p.dataset}.log") for p in preparations]
                needed = ":".join(self._submit(first, on_cpu))
                options = options | {"dependency": f"afterok:{needed}", "kill_on_invalid_dep": "yes"}
            for i in range(0, len(trainings), LARGEST_ARRAY):
                part = trainings[i : i + LARGEST_ARRAY]
                submitted = self._submit([TrainingJob(t, self.experiment, variables) for t in part], options)
                for training, job in zip(part, submitted, strict=True):
                    Record.of(training, out).write({"job": job})
                jobs += submitted
        except (FailedSubmissionError, FailedJobError, subprocess.CalledProcessError) as error:
            raise LoMixError(f"SLURM has refused the jobs: {' '.join(str(error).split())}.") from None
        return jobs

    def _submit(self, jobs: Sequence[PreparationJob | TrainingJob], options: dict[str, Any]) -> list[str]:
        executor = self._make_executor(options)
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
        return [job.job_id for job in submitted]

    def _make_executor(self, options: dict[str, Any]) -> SlurmExecutor:
        try:
            executor = SlurmExecutor(self.folder, max_num_timeout=REQUEUES)
        except RuntimeError:
            raise LoMixError("SLURM's commands (srun, sbatch) are not on the PATH: run this on a login node.") from None
        own = {"signal_delay_s": SIGNAL_DELAY} | {k: v for k, v in options.items() if k in OF_SUBMITIT}
        own |= {k: [v] for k, v in own.items() if k in LISTS and isinstance(v, str)}
        # a job that is preempted comes back
        sbatch = {k.replace("-", "_"): v for k, v in options.items() if k not in OF_SUBMITIT}
        executor.update_parameters(**own, additional_parameters={"job_name": "nnunet_lomix", "requeue": True, **sbatch})
        return executor


def list_queue() -> Collection[str]:
    """The jobs of this user that SLURM has in its queue, waiting or running, as ``12_3`` or ``12``.

    Raises:
        LoMixError: squeue isn't there, or SLURM doesn't answer.
    """
    command = ["squeue", "--noheader", "--array", "--format=%i", "--user", getpass.getuser()]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise LoMixError("squeue is not on the PATH: ask for the state of jobs of SLURM on a login node.") from None
    except subprocess.CalledProcessError as error:
        raise LoMixError(f"SLURM doesn't answer: {' '.join(error.stderr.split())}.") from None
    return set(output.split())
