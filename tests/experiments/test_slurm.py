"""An experiment on SLURM: first what its commands are told, by scripts in their place, then a real one of one node.

On the real one jobs are requeued, cancelled and signalled, and nothing is lost.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nnunet_lomix.experiments import machine
from nnunet_lomix.nnunet.commands import find_program

from ..conftest import NnUNet, write_dataset
from ..fuzz.world import DATASET
from .cluster import Cluster, why_not
from .conftest import TRAINERS, invoke, write_program


def slurm_of_one_node(test):
    return pytest.mark.slurm(pytest.mark.skipif(bool(why_not()), reason=why_not())(test))


# what each of SLURM's commands is told is kept; sbatch answers what is in a file, and squeue has what is in another
SCRIPT = """#!/bin/sh
echo "$(basename $0) $*" >> {folder}/asked
[ $(basename $0) = sbatch ] && env > {folder}/environment && cp $1 {folder}/script && cat {folder}/answer && exit
[ $(basename $0) != squeue ] && exit
[ -e {folder}/away ] && rm {folder}/away && echo "no answer" >&2 && exit 1
[ $(grep -c squeue {folder}/asked) -le 4 ] && cat {folder}/queue || true
"""
QUEUE = "".join(f"12_{i}\n" for i in range(4))
EPOCHS = 10
MODEL = "Dataset701_classes/nnUNetTrainerLoMixTiny__nnUNetPlans__2d"


class Commands:
    """SLURM's commands as scripts, on a login node of a setting."""

    def __init__(self, setting, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = setting.folder / "slurm"
        for name in ("sbatch", "squeue", "scancel"):
            write_program(self.folder / name, SCRIPT.format(folder=self.folder))
        monkeypatch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")
        monkeypatch.setattr(machine, "SECONDS_BETWEEN_STATES", 0.02)
        self.setting = setting

    def run(self, answer: str = "12", queue: str = "", **options) -> tuple[str, str]:
        """Output and last sentence of a run; what is in the queue is cancelled after squeue has named it four times."""
        (self.folder / "answer").write_text(answer)
        (self.folder / "queue").write_text(queue)
        (self.folder / "asked").write_text("")
        return self.setting.run(schedulers={"slurm": {"time": "1:00:00", **options}})

    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().splitlines()

    def flags(self) -> set[str]:
        """What the script that was submitted asks of sbatch."""
        lines = (self.folder / "script").read_text().splitlines()
        return {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}


@pytest.fixture
def commands(setting, monkeypatch) -> Commands:
    return Commands(setting, monkeypatch)


@pytest.mark.parametrize(
    ("answer", "options", "cluster"),
    [
        ("Submitted batch job 12\n", {}, ""),
        ("sbatch: a word of the site\n12\n", {}, ""),
        ("Submitted batch job 12 on cluster far\n", {"clusters": "near,far"}, "far"),
        ("12;far\n", {}, "far"),
        ("12\n", {"clusters": "near,far"}, "near,far"),
    ],
)
def test_a_job_is_known_again_whatever_sbatch_calls_it(commands, answer, options, cluster):
    queue = f"CLUSTER: {cluster}\n{QUEUE}" if cluster else QUEUE
    for submitted in (1, 0):  # a second command waits for what the first one has submitted, and has been cancelled
        output, error = commands.run(answer, queue, **options)
        assert "fold_1: queued" in output and "4 missing" in error
        name = f"12_3;{cluster}" if cluster else "12_3"
        folder = commands.setting.out / "slurm"
        assert f"its job {name} has left SLURM's queue before the end; what it wrote: {folder}\n" in output
        asked = commands.asked()
        assert len([line for line in asked if line.startswith("sbatch")]) == submitted
        asked = [line for line in asked if line.startswith("squeue")]
        assert all(f"--clusters={cluster} " in line if cluster else "--clusters" not in line for line in asked)
    # a status that isn't told of SLURM can't know
    own = ("-d", DATASET, "-c", "2d", "-tr", *TRAINERS, "-f", 0, 1, "--out", commands.setting.out)
    output = " ".join(invoke("status", *own)[1].split())
    assert f"SLURM has or had it as job {name}; it is asked only with --slurm," in output


def test_what_names_no_job_is_told_as_it_may_have_been_taken(commands):
    _, error = commands.run("All is well.")
    assert "sbatch has named no job, but said 'All is well.': look with squeue" in error


def test_a_moment_without_an_answer_ends_nothing(commands):
    (commands.folder / "away").touch()
    output, error = commands.run(queue=QUEUE)
    assert "SLURM's squeue has refused: no answer. Looking again." in output and "fold_0: queued" in output


def test_trainings_after_a_preparation_go_to_its_cluster_and_it_is_cancelled_if_they_are_refused(commands):
    next((commands.setting.dataset / "nnUNetPlans_2d").glob("*.pkl")).unlink()
    commands.run("12;far", clusters="near,far", gres="gpu:1")
    flags = {"--clusters=far", "--dependency=afterok:12", "--kill-on-invalid-dep=yes", "--gres=gpu:1"}
    assert flags < commands.flags()
    shutil.rmtree(commands.setting.out)
    refusing = "#!/bin/sh\ngrep -q dependency $1 && echo 'too many' >&2 && exit 1\necho '12;far'\n"
    write_program(commands.folder / "sbatch", refusing)
    _, error = commands.run(clusters="near,far", gres="gpu:1")
    assert error == "SLURM's sbatch has refused: too many." and "scancel --clusters=far 12" in commands.asked()


def test_off_the_cluster_a_plan_is_checked_and_its_commands_are_printed(setting, monkeypatch):
    monkeypatch.setenv("PATH", str(setting.folder / "bin"))
    plan = setting.write_plan("slurm: {partition: gpu, time: 1:00:00}")
    command = f"nnUNetv2_train {DATASET} 2d 0 -tr nnUNetTrainer -p nnUNetPlans -device cuda"
    assert invoke("run", plan, "--dry-run") == (0, f"{command}\n# 1 missing\n")
    assert "(sbatch, squeue) are not on the PATH: run this on a login node." in invoke("run", plan)[1]
    assert "fold_0: missing" in invoke("status", plan)[1]
    setting.trainings(folds=("0",))[0].write_note({"job": "12_3"})
    assert "1 queued" in invoke("status", plan)[1]
    output = invoke("run", plan, "--dry-run")[1]
    assert "counts as queued" in output and command not in output
    for slurm_options, sentence in (
        ("partition: gpu", "slurm needs a time limit"),
        ("time: 1, signal_delay_s: soon", "array_parallelism and signal_delay_s must be numbers"),
    ):
        code, output = invoke("run", setting.write_plan(f"slurm: {{{slurm_options}}}"), "--dry-run")
        assert code == 2 and sentence in output.replace("\n", " ")


def test_a_script_has_what_the_user_named_and_no_default_of_submitits(commands):
    commands.run(partition="gpu", exclusive="true", comment="my word", wckey="false")
    output = {f"--{name}={commands.setting.out}/slurm/%A_%a_0_log.{name[:3]}" for name in ("output", "error")}
    own = {"--array=0-3", "--job-name=nnunet_lomix", "--open-mode=append", "--requeue", "--signal=USR2@120"}
    users = {"--time=1:00:00", "--partition=gpu", "--exclusive", "--comment='my word'"}
    assert commands.flags() == {*output, *own, *users}
    numbers = {"array_parallelism": "2", "signal_delay_s": 60, "nodes": 1, "cpus-per-task": 3}
    commands.run(setup=["module load x"], requeue="false", **numbers)
    assert {"--array=0-3%2", "--signal=USR2@60", "--nodes=1", "--cpus-per-task=3"} < commands.flags()
    assert "--requeue" not in commands.flags()
    script = (commands.folder / "script").read_text()
    assert "\nexport SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\nmodule load x\n" in script


def test_jobs_inherit_nothing_of_a_job_in_which_they_are_submitted(commands, monkeypatch):
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "near", "SBATCH_ACCOUNT": "mine"}
    inherited = ("SLURM_MEM_PER_NODE", "SLURM_CPU_BIND", "SLURMD_NODENAME", "SRUN_DEBUG", "SUBMITIT_EXECUTOR")
    for name, value in {**kept, **dict.fromkeys(inherited, "1")}.items():
        monkeypatch.setenv(name, value)
    commands.run()
    lines = (commands.folder / "environment").read_text().splitlines()
    assert {f"{name}={value}" for name, value in kept.items()} <= set(lines)
    assert not [line for line in lines if line.startswith(inherited)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "slurm", slots=3)
    yield cluster
    cluster.stop()


class Runs:
    """nnunet_lomix run and status in an environment that finds the cluster and a raw dataset of nnU-Net."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        nnunet = NnUNet(folder / "nnunet")
        for path in (nnunet.preprocessed, nnunet.results):
            path.mkdir(parents=True)
        write_dataset(nnunet.raw, 701, "classes")
        self.results, self.folder = nnunet.results, folder
        tiny = {"TINY_EPOCHS": str(EPOCHS), "COLUMNS": "200"}
        self.variables = {**os.environ, **nnunet.variables, **cluster.variables, **tiny}
        experiment = {
            "datasets": 701,
            "configurations": "2d",
            "trainers": "nnUNetTrainerLoMixTiny",
            "folds": [0, 1, 2],
            "device": "cpu",
            "slurm": {"partition": "tests", "time": "01:00:00", "cpus-per-task": 1, "signal_delay_s": 60},
        }
        (folder / "plan.yaml").write_text(yaml.safe_dump(experiment))

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        program = find_program("nnunet_lomix", str(Path(sys.executable).parent))
        pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([program, *arguments], cwd=self.folder, env=self.variables, **pipes)

    def fold(self, fold: int) -> Path:
        return self.results / MODEL / f"fold_{fold}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cluster):
    return Runs(tmp_path_factory.mktemp("runs"), cluster)


def wait_for(condition, process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 800  # a busy machine takes its time
    while not condition():
        if time.monotonic() > end:
            process.terminate()
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)


def epochs_of(fold: Path) -> list[int]:
    """The epochs that were begun, in all of nnU-Net's logs of a training."""
    logs = sorted(fold.glob("training_log_*.txt"))
    return [int(epoch) for log in logs for epoch in re.findall(r"Epoch (\d+)", log.read_text())]


def require_that_nothing_was_lost(epochs: list[int]) -> None:
    """After one interruption at most the epoch that was under way was begun twice."""
    assert sorted(set(epochs)) == list(range(EPOCHS)) and len(epochs) - EPOCHS in (0, 1), epochs


@slurm_of_one_node
def test_jobs_that_are_requeued_cancelled_and_signalled_lose_nothing(runs, cluster):
    run = runs.start("run", "plan.yaml")
    wait_for(lambda: cluster.ask("squeue", "--noheader", "--format=%j").count("nnunet_lomix") > 1, run)
    queue = cluster.ask("squeue", "--noheader", "--array", "--format=%i").split()
    array = max(int(job.split("_")[0]) for job in queue)  # the first one prepares
    jobs = {fold: f"{array}_{fold}" for fold in range(3)}
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
    output = run.communicate(timeout=900)[0]

    # the cancelled one is not started again by itself
    assert run.returncode == 1 and "2 done, 1 interrupted" in output, output
    assert f"its job {jobs[1]} has left SLURM's queue" in output
    status = runs.start("status", "plan.yaml")
    assert "2 done, 1 interrupted" in status.communicate()[0]

    run = runs.start("run", "plan.yaml")
    output = run.communicate(timeout=900)[0]
    assert run.returncode == 0 and "3 done" in output, output
    for fold in range(3):
        require_that_nothing_was_lost(epochs_of(runs.fold(fold)))


@slurm_of_one_node
def test_a_job_that_is_preempted_comes_back(runs, cluster):
    """SLURM sends SIGTERM, and ends and requeues the job after a time of grace, unless it has ended by itself."""
    options = ("-f", "3", "--out", "preempted")
    run = runs.start("run", "plan.yaml", *options)
    wait_for(lambda: 2 in epochs_of(runs.fold(3)), run)
    (job,) = cluster.ask("squeue", "--noheader", "--format=%i").split()
    cluster.ask("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_for(lambda: "PENDING" in cluster.ask("squeue", "-h", "-j", job, "--format=%T"), run)
    assert "1 queued" in runs.start("status", "plan.yaml", *options).communicate()[0]
    cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    output = run.communicate(timeout=900)[0]
    assert run.returncode == 0 and "1 done" in output, output
    require_that_nothing_was_lost(epochs_of(runs.fold(3)))
