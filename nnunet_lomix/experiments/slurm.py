"""Trainings as job arrays of SLURM. On a node submitit runs them, and brings them back after the time limit."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from nnunet_lomix.errors import LoMixError, UsageError
from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.job import INTERRUPTED, finish, start
from nnunet_lomix.experiments.machine import Machine
from nnunet_lomix.experiments.preparation import Preparation, Todo
from nnunet_lomix.experiments.training import Training
from nnunet_lomix.files import replacing

if TYPE_CHECKING:  # slow to import
    from submitit.helpers import DelayedSubmission

SECONDS_BETWEEN_POLLS = 0.5
LONGEST_GRACE = 3600  # seconds between SIGTERM and the end of a job that is preempted; clusters give minutes
PATIENCE = 60  # seconds, for an answer of SLURM's
LARGEST_ARRAY = 1000  # SLURM's default limit is one more
REQUEUES = 1000  # by submitit, after the time limit: a long training may need many
# the options that are not sbatch's own
NUMBERS = ("array_parallelism", "signal_delay_s")
SIGNAL_DELAY = 120  # seconds before the time limit
LISTS = ("setup", "srun_args", "teardown")
# options that ask for GPUs, which preprocessing doesn't need
FOR_GPUS = ("gpus", "gres", "gpus_per_node", "gpus_per_task", "gpus_per_socket", "cpus_per_gpu", "mem_per_gpu")
OF_A_JOB = re.compile(r"(?!SLURM_(CONF|CLUSTERS)$)(SLURM|SLURMD|SRUN|SUBMITIT)_")  # variables
# sbatch's answer, with the cluster if there are several, with --parsable, too
ANSWER = re.compile(r"^(?:Submitted batch job )?(\d+)(?:(?: on cluster |;)(\S+))?$", re.MULTILINE)


class Slurm(Machine):
    """Puts trainings into SLURM's queue, and waits for them.

    A job is named as squeue does, ``12_3``, with ``;CLUSTER`` behind if it was submitted to another cluster.
    """

    interrupted = (
        "SLURM's jobs go on without this command: run it again to wait for them and for the report, look with "
        "nnunet_lomix status, and end them with scancel."
    )

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self._sbatch = {key.replace("-", "_"): value for key, value in experiment.schedulers["slurm"].items()}

    def check(self, dry_run: bool) -> None:
        if "time" not in self._sbatch:
            raise UsageError("slurm needs a time limit, such as time=24:00:00; trainings that reach it come back.")
        if not all(re.fullmatch("[0-9]{1,9}", str(self._sbatch.get(key, 0))) for key in NUMBERS):
            raise UsageError(f"slurm: {' and '.join(NUMBERS)} must be numbers.")
        if not dry_run and not all(map(shutil.which, ("sbatch", "squeue"))):
            raise LoMixError("SLURM's commands (sbatch, squeue) are not on the PATH: run this on a login node.")

    def submit(self, todo: Todo) -> None:
        prepared: list[Training] = []
        for preparation in todo.preparations:
            own = [t for t in todo.ready if t.dataset == preparation.dataset]
            if not preparation.list_commands():
                preparation.run()  # the folds may be missing
                prepared += own
            elif own:
                self._submit_after(preparation, own)
        self._submit_trainings(prepared, self._sbatch, {})

    def find_jobs(self, noted: Collection[str]) -> Collection[str]:
        """As for any machine; all of them, with a warning, where there is no squeue."""
        if noted and not shutil.which("squeue"):
            print("squeue is not on the PATH: what was submitted counts as queued.", file=sys.stderr)
            return noted
        jobs = set()
        for cluster in {job.partition(";")[2] for job in noted}:
            user = ("--user", str(os.getuid()))
            answer = _ask("squeue", *_on(cluster), "--noheader", "--all", "--array", "--format=%i", *user)
            lines = [line.strip() for line in answer.splitlines()]
            jobs |= {_name(line, cluster) for line in lines if line[:1].isdecimal()}  # the others name the cluster
        return jobs

    def _submit_after(self, preparation: Preparation, trainings: Sequence[Training]) -> None:
        """Submit trainings of a dataset that is prepared first, by a job without GPUs."""
        without = {key: value for key, value in self._sbatch.items() if key not in FOR_GPUS}
        (needed,) = self._submit([partial(prepare, preparation, _variables())], without)
        array, cluster = needed.split("_")[0], needed.partition(";")[2]
        dependency = ",".join(filter(None, [self._sbatch.get("dependency"), f"afterok:{array}"]))
        options = self._sbatch | {"dependency": dependency, "kill_on_invalid_dep": "yes"}
        try:
            self._submit_trainings(trainings, options | ({"clusters": cluster} if cluster else {}), {"after": needed})
        except LoMixError:
            subprocess.run(["scancel", *_on(cluster), array], check=False)
            raise

    def _submit_trainings(
        self, trainings: Sequence[Training], options: Mapping[str, Any], note: Mapping[str, str]
    ) -> None:
        for i in range(0, len(trainings), LARGEST_ARRAY):
            part = trainings[i : i + LARGEST_ARRAY]
            jobs = self._submit([TrainingJob(t, self.options, _variables()) for t in part], options)
            for training, job in zip(part, jobs, strict=True):
                training.write_note({"job": job, **note})
            print(f"SLURM has taken {len(jobs)} jobs: {jobs[0]} to {jobs[-1]}.", flush=True)

    def _submit(self, jobs: Sequence[Callable[[], None]], options: Mapping[str, Any]) -> list[str]:
        """Submit an array, whose jobs find what they shall call in files that are named after them."""
        from submitit.core.utils import JobPaths  # slow to import
        from submitit.helpers import DelayedSubmission

        folder = self.trainings[0].out / "slurm"
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "submission.sh"
        script.write_text(make_script(options, folder, len(jobs)))
        answer = _ask("sbatch", str(script), patience=None)  # jobs that it may have taken must not be forgotten
        named = ANSWER.search(answer)
        if named is None:
            raise LoMixError(
                f"sbatch has named no job, but said {' '.join(answer.split())!r}: look with squeue what it has taken, "
                "and end that with scancel, before you run this again."
            )
        number, cluster = named[1], named[2] or options.get("clusters", "")
        for i, job in enumerate(jobs):
            submission = DelayedSubmission(job)
            submission.set_timeout(0, REQUEUES)
            with replacing(JobPaths(folder, f"{number}_{i}").submitted_pickle) as temporary:
                submission.dump(temporary)
        return [_name(f"{number}_{i}", cluster) for i in range(len(jobs))]


@dataclass
class TrainingJob:
    """One training on a node; the job is started again with the same object after it has been requeued."""

    training: Training
    options: Sequence[str]  # further arguments of nnUNetv2_train
    variables: Mapping[str, str]  # nnU-Net's where the experiment was started: a cluster may not hand them on
    process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)
    ends: bool = field(default=False, init=False)  # whether SLURM has told this job to end

    def __call__(self) -> None:
        if self.training.folder.is_validated():  # requeued at the last moment
            return
        signal.signal(signal.SIGTERM, self._note_the_end)
        self.process = start(self.training, self.options, self.variables)
        while self.process.poll() is None:
            time.sleep(SECONDS_BETWEEN_POLLS)
        if self.process.returncode in INTERRUPTED:
            time.sleep(10)  # the signal comes to this process, too: one before the time limit calls checkpoint
        if self.ends:  # SLURM ends this job, and if it is preempted, brings it back; one that ends itself stays away
            time.sleep(LONGEST_GRACE)
        finish(self.training, self.process)
        if self.process.returncode:  # so SLURM's job has failed, too
            raise LoMixError(f"{self.training.name} did not end; its log is {self.training.log}.")

    def checkpoint(self) -> "DelayedSubmission":
        """Called by submitit before the time limit: the training has had the signal, too, and saves itself."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None and not _has_ended(self.process, PATIENCE):
            with suppress(ProcessLookupError):  # where SLURM signals one process of a job alone
                self.process.send_signal(signal.SIGUSR2)
            _has_ended(self.process, float("inf"))
        return DelayedSubmission(TrainingJob(self.training, self.options, self.variables))

    def _note_the_end(self, number: int, frame: FrameType | None) -> None:
        self.ends = True


def prepare(preparation: Preparation, variables: Mapping[str, str]) -> None:
    """Plan and preprocess one dataset on a node, with nnU-Net's variables of where the experiment was started."""
    os.environ.update(variables)
    preparation.run()


def make_script(options: Mapping[str, Any], folder: Path, jobs: int) -> str:
    """What sbatch is given for an array: the options of the user, and what submitit and a job that comes back need.

    The options have underscores for hyphens. The folder is for submitit's files and the output of the jobs.
    """
    at_a_time = f"%{options['array_parallelism']}" if "array_parallelism" in options else ""
    setup, srun_args, teardown = (_as_list(options.get(key, [])) for key in LISTS)
    output = f"{folder}/%A_%a_%t_log"
    sbatch = {
        "job_name": "nnunet_lomix",
        "array": f"0-{jobs - 1}{at_a_time}",
        "signal": f"USR2@{options.get('signal_delay_s', SIGNAL_DELAY)}",
        "requeue": True,  # a job that is preempted comes back
        "open_mode": "append",
        "output": f"{folder}/%A_%a_0_log.out",
        "error": f"{folder}/%A_%a_0_log.err",
    } | {key: value for key, value in options.items() if key not in (*NUMBERS, *LISTS)}
    flags = []
    for key, value in sbatch.items():
        text = str(value)
        if text.lower() != "false":  # nor has an option without a value, which is true, anything behind it
            setting = "" if text.lower() == "true" else f"={shlex.quote(text)}"
            flags.append(f"#SBATCH --{key.replace('_', '-')}{setting}")
    # srun no longer hands on this since 22.05, and a cluster may hand on nothing
    cpus = ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"] if "cpus_per_task" in options else []
    srun = ["srun", "--unbuffered", f"--output={output}.out", f"--error={output}.err", "--export=ALL", *srun_args]
    call = shlex.join([*srun, sys.executable, "-u", "-m", "submitit.core._submit", str(folder)])
    return "\n".join(["#!/bin/bash", *flags, *cpus, *setup, "export SUBMITIT_EXECUTOR=slurm", call, *teardown, ""])


def _as_list(value: Any) -> list[str]:
    return [str(line) for line in (value if isinstance(value, list) else [value])]


def _variables() -> dict[str, str]:
    """nnU-Net's, which a job needs as they are here."""
    return {name: value for name, value in os.environ.items() if name.startswith("nnUNet_")}


def _has_ended(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Whether a process ends within a time; its status is left for whoever waits for it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(ChildProcessError):
            if not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                time.sleep(SECONDS_BETWEEN_POLLS)
                continue
        return True
    return False


def _on(cluster: str) -> list[str]:
    """The option by which SLURM's commands ask another cluster."""
    return [f"--clusters={cluster}"] if cluster else []


def _name(job: str, cluster: str) -> str:
    return f"{job};{cluster}" if cluster else job


def _ask(*command: str, patience: float | None = PATIENCE) -> str:
    """What one of SLURM's commands says; a LoMixError if it isn't there, fails, or doesn't answer."""
    # a shell within a job, as of salloc, has that job's limits in its variables, and would hand them on to new jobs
    variables = {name: value for name, value in os.environ.items() if not OF_A_JOB.match(name)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=patience, env=variables)
        return done.stdout
    except FileNotFoundError:
        raise LoMixError(f"{command[0]} is not on the PATH: run this on a login node.") from None
    except subprocess.TimeoutExpired:
        raise LoMixError(f"SLURM's {command[0]} has not answered for {patience} seconds.") from None
    except subprocess.CalledProcessError as error:
        raise LoMixError(f"SLURM's {command[0]} has refused: {' '.join(error.stderr.split())}.") from None
