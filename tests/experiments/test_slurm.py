"""An experiment on a real SLURM of one node: jobs are requeued, cancelled and signalled, and nothing is lost."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nnunet_lomix.nnunet.commands import find_program

from ..conftest import NnUNet, write_dataset
from .cluster import Cluster, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(why_not()), reason=why_not())]
EPOCHS = 10
MODEL = "Dataset701_classes/nnUNetTrainerLoMixTiny__nnUNetPlans__2d"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "slurm", slots=3)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cluster):
    return Runs(tmp_path_factory.mktemp("runs"), cluster)


class Runs:
    """nnunet_lomix run and status in an environment that finds the cluster and a raw dataset of nnU-Net."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        nnunet = NnUNet(folder / "nnunet")
        for path in (nnunet.preprocessed, nnunet.results):
            path.mkdir(parents=True)
        write_dataset(nnunet.raw, 701, "classes")
        self.results = nnunet.results
        self.folder = folder
        tiny = {"TINY_EPOCHS": str(EPOCHS), "COLUMNS": "200"}
        self.variables = {**os.environ, **nnunet.variables, **cluster.variables, **tiny}
        experiment = {
            "datasets": 701,
            "configurations": "2d",
            "trainers": ["nnUNetTrainerTiny", "nnUNetTrainerLoMixTiny"],
            "folds": [0, 1, 2],
            "device": "cpu",
            "slurm": {"partition": "tests", "time": "01:00:00", "cpus-per-task": 1, "signal_delay_s": 60},
        }
        (folder / "plan.yaml").write_text(yaml.safe_dump(experiment))

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        program = find_program("nnunet_lomix", str(Path(sys.executable).parent))
        return subprocess.Popen(
            [program, *arguments],
            cwd=self.folder,
            env=self.variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def fold(self, fold: int) -> Path:
        return self.results / MODEL / f"fold_{fold}"


def wait_for(condition, process: "subprocess.Popen[str]") -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.terminate()
    raise AssertionError(process.communicate()[0])


def epochs_of(fold: Path) -> list[int]:
    """The epochs that were begun, in all of nnU-Net's logs of a training."""
    logs = sorted(fold.glob("training_log_*.txt"))
    return [int(epoch) for log in logs for epoch in re.findall(r"Epoch (\d+)", log.read_text())]


def require_that_nothing_was_lost(epochs: list[int]) -> None:
    """After one interruption at most the epoch that was under way was begun twice."""
    assert sorted(set(epochs)) == list(range(EPOCHS)) and len(epochs) - EPOCHS in (0, 1), epochs


def test_jobs_that_are_requeued_cancelled_and_signalled_end_in_a_report(runs, cluster):
    run = runs.start("run", "plan.yaml")
    wait_for(lambda: cluster.ask("squeue", "--noheader", "--format=%j").count("nnunet_lomix") > 1, run)
    array = next(
        line.split("_")[0]
        for line in cluster.ask("squeue", "--noheader", "--array", "--format=%i").split()
        if "_" in line
    )
    # of our trainer, by fold
    jobs = {fold: f"{array}_{3 + fold}" for fold in range(3)}
    for fold, end in {
        0: ("scontrol", "requeue", jobs[0]),
        1: ("scancel", jobs[1]),
        2: ("scancel", "--signal=USR2", jobs[2]),  # as before the time limit
    }.items():
        wait_for(lambda fold=fold: 2 in epochs_of(runs.fold(fold)), run)
        cluster.ask(*end)
    for fold in (0, 2):  # SLURM itself would wait for two minutes
        wait_for(lambda fold=fold: "PENDING" in cluster.ask("squeue", "-h", "-j", jobs[fold], "--format=%T"), run)
        cluster.ask("scontrol", "update", f"JobId={jobs[fold]}", "StartTime=now")
    output = run.communicate(timeout=300)[0]

    # the cancelled one is not started again by itself
    assert run.returncode == 1 and "5 done, 1 interrupted" in output, output
    assert f"its job {jobs[1]} has left SLURM's queue" in output
    status = runs.start("status", "plan.yaml")
    assert "5 done, 1 interrupted" in status.communicate()[0]

    run = runs.start("run", "plan.yaml")
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0 and "6 done" in output, output
    assert (runs.folder / "nnunet_lomix_run/report/Dataset701_classes__nnUNetPlans__2d/report.html").is_file()
    for fold in range(3):
        require_that_nothing_was_lost(epochs_of(runs.fold(fold)))


def test_a_job_that_is_preempted_comes_back(runs, cluster):
    """SLURM sends SIGTERM, and ends and requeues the job after a time of grace, unless it has ended by itself."""
    options = ("-tr", "nnUNetTrainerLoMixTiny", "-f", "3", "--out", "preempted")
    run = runs.start("run", "plan.yaml", *options)
    wait_for(lambda: 2 in epochs_of(runs.fold(3)), run)
    (job,) = cluster.ask("squeue", "--noheader", "--format=%i").split()
    cluster.ask("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_for(lambda: "PENDING" in cluster.ask("squeue", "-h", "-j", job, "--format=%T"), run)
    assert "1 queued" in runs.start("status", "plan.yaml", *options).communicate()[0]
    cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0 and "1 done" in output, output
    require_that_nothing_was_lost(epochs_of(runs.fold(3)))
