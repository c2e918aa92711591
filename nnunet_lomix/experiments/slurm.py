"""Trainings as job arrays of SLURM, by submitit."""

import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission

from nnunet_lomix.errors import LoMixError, UsageError
from nnunet_lomix.experiments.display import Display
from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.job import INTERRUPTED, finish, start
from nnunet_lomix.experiments.preparation import Preparation
from nnunet_lomix.experiments.training import Record, State, Training, log_file, read_state

SECONDS_BETWEEN_POLLS = 0.5
SECONDS_BETWEEN_QUEUES = 10  # SLURM doesn't like to be asked often
LONGEST_GRACE = 3600  # seconds between SIGTERM and the end of a job that is preempted; clusters give minutes
PATIENCE = 60  # seconds, for an answer of SLURM's
LARGEST_ARRAY = 1000  # SLURM's default limit is one more
REQUEUES = 1000  # by submitit, after the time limit: a long training may need many
# what submitit itself reads; all others are sbatch's own
NUMBERS = {"array_parallelism": 256, "signal_delay_s": 120}
LISTS = ("setup", "srun_args", "teardown")
# options that ask for GPUs, which preprocessing doesn't need
FOR_GPUS = ("gpus", "gres", "gpus_per_node", "gpus_per_task", "gpus_per_socket", "cpus_per_gpu", "mem_per_gpu")


@dataclass
class PreparationJob:
    """Planning and preprocessing of one dataset on a node."""

    preparation: Preparation
    log: Path
    variables: dict[str, str]

    def __call__(self) -> None:
        os.environ.update(self.variables)
        self.preparation.run(self.log)


@dataclass
class TrainingJob:
    """One training on a node; the job is started again with the same object after it has been requeued.

    Attributes:
        training, experiment: which; the experiment has a device.
        variables: nnU-Net's where the experiment was started: a cluster may not hand them on.
    """

    training: Training
    experiment: Experiment
    variables: dict[str, str]
    process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)
    ends: bool = field(default=False, init=False)  # whether SLURM has told this job to end

    def __call__(self) -> None:
        if read_state(self.training, Path(self.experiment.out)) is State.DONE:  # requeued at the last moment
            return
        signal.signal(signal.SIGTERM, self._note_the_end)
        self.process = start(self.training, self.experiment, self.variables)
        while self.process.poll() is None:
            time.sleep(SECONDS_BETWEEN_POLLS)
        if self.process.returncode in INTERRUPTED:
            time.sleep(10)  # the signal comes to this process, too: one before the time limit calls checkpoint
        if self.ends:  # SLURM ends this job, and if it is preempted, brings it back; one that ends itself stays away
            time.sleep(LONGEST_GRACE)
        finish(self.training, self.experiment, self.process)
        if self.process.returncode:
            log = log_file(self.training, Path(self.experiment.out))
            raise LoMixError(f"{self.training.name} did not end; its log is {log}.")  # so SLURM's job has failed, too

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit before the time limit: the training has had the signal, too, and saves itself."""
        if self.process is not None and not _has_ended(self.process, PATIENCE):
            with suppress(ProcessLookupError):  # where SLURM signals one process of a job alone
                self.process.send_signal(signal.SIGUSR2)
            _has_ended(self.process, float("inf"))
        return DelayedSubmission(TrainingJob(self.training, self.experiment, self.variables))

    def _note_the_end(self, number: int, frame: FrameType | None) -> None:
        self.ends = True


def _has_ended(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Whether a process ends within a time; its status is left for whoever waits for it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                return True
        except ChildProcessError:
            return True
        time.sleep(SECONDS_BETWEEN_POLLS)
    return False


class Slurm:
    """Puts trainings into SLURM's queue, and waits for them.

    Args:
        experiment: its trainings; with a device and options of sbatch.

    Attributes:
        slots: none; SLURM chooses where a training runs.

    Raises:
        LoMixError: SLURM's commands aren't there.
        UsageError: an option is missing, or isn't what it should be.
    """

    slots: Sequence[dict[str, str]] = ()

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.options = {key.replace("-", "_"): value for key, value in (experiment.slurm or {}).items()}
        if "time" not in self.options:  # submitit would say five minutes
            raise UsageError("slurm needs a time limit, such as time=24:00:00; trainings that reach it come back.")
        self.folder = Path(experiment.out) / "slurm"
        self._make_executor(self.options)

    def run(self, trainings: Sequence[Training], preparations: Sequence[Preparation], console: Console) -> None:
        """Submit, and wait until SLURM has no job of the experiment any more; an interrupt ends the waiting alone.

        Raises:
            LoMixError: SLURM doesn't take the jobs, or there was an interrupt.
        """
        try:
            if trainings:
                jobs = self.submit(trainings, preparations)
                console.print(f"SLURM has taken {len(jobs)} jobs: {jobs[0]} to {jobs[-1]}.", highlight=False)
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
        """Submit trainings, those of a dataset that must be prepared after a job that does it.

        Returns:
            The jobs of the trainings, as squeue names them.

        Raises:
            LoMixError: SLURM doesn't take them.
        """
        logs = Path(self.experiment.out) / "logs"
        jobs: list[str] = []
        prepared = {t.dataset for t in trainings}
        for preparation in preparations:
            if not preparation.list_commands():
                preparation.run(logs / f"{preparation.dataset}.log")  # the folds may be missing
                continue
            prepared.remove(preparation.dataset)
            own = [t for t in trainings if t.dataset == preparation.dataset]
            jobs += self._submit_after(
                PreparationJob(preparation, logs / f"{preparation.dataset}.log", _variables()), own
            )
        return jobs + self._submit_trainings([t for t in trainings if t.dataset in prepared], self.options, {})

    def _submit_after(self, first: PreparationJob, trainings: Sequence[Training]) -> list[str]:
        without = {key: value for key, value in self.options.items() if key not in FOR_GPUS}
        (needed,) = self._submit([first], without)
        dependency = ",".join(filter(None, [self.options.get("dependency"), f"afterok:{needed}"]))
        options = self.options | {"dependency": dependency, "kill_on_invalid_dep": "yes"}
        try:
            return self._submit_trainings(trainings, options, {"after": needed})
        except LoMixError:
            subprocess.run(["scancel", needed], check=False)
            raise

    def _submit_trainings(
        self, trainings: Sequence[Training], options: Mapping[str, Any], note: Mapping[str, str]
    ) -> list[str]:
        jobs: list[str] = []
        for i in range(0, len(trainings), LARGEST_ARRAY):
            part = trainings[i : i + LARGEST_ARRAY]
            submitted = self._submit([TrainingJob(t, self.experiment, _variables()) for t in part], options)
            for training, job in zip(part, submitted, strict=True):
                Record.of(training, Path(self.experiment.out)).write({"job": job, **note})
            jobs += submitted
        return jobs

    def _submit(self, jobs: Sequence[PreparationJob | TrainingJob], options: Mapping[str, Any]) -> list[str]:
        executor = self._make_executor(options)
        try:
            with executor.batch():
                submitted = [executor.submit(job) for job in jobs]
        except (FailedSubmissionError, FailedJobError, subprocess.CalledProcessError) as error:
            raise LoMixError(f"SLURM has refused the jobs: {' '.join(str(error).split())}.") from None
        return [job.job_id for job in submitted]

    def _make_executor(self, options: Mapping[str, Any]) -> SlurmExecutor:
        try:
            executor = SlurmExecutor(self.folder, max_num_timeout=REQUEUES)
        except RuntimeError:
            raise LoMixError("SLURM's commands (srun, sbatch) are not on the PATH: run this on a login node.") from None
        try:
            own: dict[str, Any] = {key: int(options.get(key, usual)) for key, usual in NUMBERS.items()}
        except (TypeError, ValueError):
            raise UsageError(f"slurm: {' and '.join(NUMBERS)} must be numbers.") from None
        for key in LISTS:
            value = options.get(key, [])
            own[key] = [str(line) for line in (value if isinstance(value, list) else [value])]
        # a cluster may hand on nothing, and srun no longer hands on this since 22.05
        own["srun_args"] = ["--export=ALL", *own["srun_args"]]
        if "cpus_per_task" in options:
            own["setup"] = ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK", *own["setup"]]
        sbatch = {key: _as_flag(value) for key, value in options.items() if key not in (*NUMBERS, *LISTS)}
        # a job that is preempted comes back
        sbatch = {"job_name": "nnunet_lomix", "requeue": True} | sbatch
        executor.update_parameters(
            **own, additional_parameters={key: value for key, value in sbatch.items() if value is not False}
        )
        return executor


def _variables() -> dict[str, str]:
    """nnU-Net's, which a job needs as they are here."""
    return {name: value for name, value in os.environ.items() if name.startswith("nnUNet_")}


def _as_flag(value: Any) -> Any:
    """Of an option without a value: true for the option, false to leave it out."""
    return {"true": True, "false": False}.get(str(value).lower(), value)


def list_queue() -> Collection[str]:
    """The jobs of this user that SLURM has in its queue, waiting or running, as ``12_3`` or ``12``.

    Raises:
        LoMixError: squeue isn't there, or SLURM doesn't answer.
    """
    command = ["squeue", "--noheader", "--all", "--array", "--format=%i", "--user", str(os.getuid())]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    except FileNotFoundError:
        raise LoMixError("squeue is not on the PATH: ask for the state of jobs of SLURM on a login node.") from None
    except subprocess.TimeoutExpired:
        raise LoMixError(f"SLURM has not answered for {PATIENCE} seconds.") from None
    except subprocess.CalledProcessError as error:
        raise LoMixError(f"SLURM doesn't answer: {' '.join(error.stderr.split())}.") from None
    return set(output.split())
