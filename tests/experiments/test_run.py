"""Running an experiment on this machine; nnU-Net's training command is a short script, but once it is nnU-Net's own."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from nnunet_lomix.cli import main
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments import Experiment, job, local, preparation
from nnunet_lomix.experiments.display import read_states
from nnunet_lomix.experiments.run import run_experiment, show_status
from nnunet_lomix.nnunet.commands import find_program, folders_below

from ..conftest import NnUNet, write_dataset
from ..fuzz.world import write_world
from .processes import hold_lock

DATASET = "Dataset701_classes"
TRAINERS = ("nnUNetTrainer", "nnUNetTrainerLoMix")
# what the script does is in a file by the trainer and fold: fail, be killed, take long; else it trains and validates
SCRIPT = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
dataset, configuration, fold, _, trainer, _, plans, *_ = sys.argv[1:]
model = pathlib.Path(os.environ["nnUNet_results"], dataset, f"{{trainer}}__{{plans}}__{{configuration}}")
folder = model / f"fold_{{fold}}"
orders = json.loads(pathlib.Path(os.environ["ORDERS"]).read_text())
with open(os.environ["ORDERS"] + ".log", "a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["nnUNet_results"]]) + "\\n")
(folder / "training_log_2026_1_2_03_04_05.txt").touch()
print("Epoch 0", flush=True)
order = orders.get(f"{{trainer}} {{fold}}")
if order == "fail":
    print("\\nRuntimeError: no luck today\\n")
    sys.exit(1)
if order in ("stop", "die"):
    (folder / "checkpoint_latest.pth").touch()
    os.kill(os.getpid(), {{"stop": signal.SIGTERM, "die": signal.SIGKILL}}[order])
if order == "fork" and os.fork() == 0:
    pathlib.Path(os.environ["ORDERS"] + ".child").write_text(str(os.getpid()))
    time.sleep(600)
if order == "hang":
    time.sleep(600)
(folder / "checkpoint_final.pth").touch()
(folder / "validation").mkdir(exist_ok=True)
(folder / "validation/summary.json").write_text("{{}}")
"""


class Setting:
    """An experiment whose dataset is prepared, with the script in place of nnUNetv2_train and without a report."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.cascade = False
        for name in ("raw", "preprocessed", "results"):
            (folder / name).mkdir()
            monkeypatch.setenv(f"nnUNet_{name}", str(folder / name))
        script = folder / "script.py"
        script.write_text(SCRIPT)
        script.chmod(0o755)
        monkeypatch.setattr(job, "find_program", lambda name, path: str(script))
        monkeypatch.setattr(preparation, "find_preparations", lambda trainings: [])
        monkeypatch.setattr(preparation, "find_first_stage", self.first_stage)
        monkeypatch.setattr("nnunet_lomix.nnunet.trainer_lookup.look_up_trainer", lambda name: None)
        monkeypatch.setattr("nnunet_lomix.experiments.run._compare", lambda *args: None)
        monkeypatch.setattr(local, "SECONDS_BETWEEN_POLLS", 0.05)
        self.orders = folder / "orders"
        monkeypatch.setenv("ORDERS", str(self.orders))
        self.out = folder / "out"

    def first_stage(self, training) -> str | None:
        """The second trainer waits for fold 0 of the first one, as the stages of a cascade do."""
        waits = self.cascade and training.trainer == TRAINERS[1]
        first = self.experiment().list_trainings()[0]
        return "3d_lowres" if waits and not (first.folder.path / "validation").exists() else None

    def experiment(self, **changes) -> Experiment:
        own = {"folds": ("0", "1"), "device": "cpu", "out": str(self.out), **changes}
        return Experiment((DATASET,), ("2d",), TRAINERS, **own)

    def run(self, orders: dict[str, str] | None = None, retry: bool = False, **changes) -> tuple[str, str]:
        """What was printed, and the sentence at the end if there was one."""
        self.orders.write_text(json.dumps(orders or {}))
        console = Console(width=200, record=True, file=io.StringIO())
        try:
            run_experiment(self.experiment(**changes), console, retry)
        except LoMixError as error:
            return console.export_text(), str(error)
        return console.export_text(), ""

    def started(self) -> list[tuple[list[str], str | None, str]]:
        log = Path(f"{self.orders}.log")
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def setting(tmp_path, monkeypatch) -> Setting:
    return Setting(tmp_path, monkeypatch)


def test_all_is_run_once(setting):
    output, error = setting.run(jobs=3)
    assert not error and "4 done" in output
    assert sorted((a[4], a[2]) for a, *_ in setting.started()) == [(t, f) for t in TRAINERS for f in "01"]
    output, error = setting.run()
    assert not error and "4 done" in output and len(setting.started()) == 4


def test_what_was_killed_continues_and_what_failed_waits_for_retry(setting):
    output, error = setting.run({"nnUNetTrainer 0": "stop", "nnUNetTrainer 1": "fail"})
    assert error == (
        "Not all trainings are done (2 done, 1 interrupted, 1 failed): run the same command again with --retry to try "
        "the failed ones again."
    )
    log = setting.out / "logs/seed_0" / DATASET / "nnUNetTrainer__nnUNetPlans__2d/fold_1.log"
    assert f"{DATASET}/nnUNetTrainer__nnUNetPlans__2d/fold_1 failed; the end of {log}:" in output
    assert "RuntimeError: no luck today" in output
    show_status(setting.experiment(), console := Console(width=200, record=True, file=io.StringIO()))
    assert "no luck today" in console.export_text()

    before = len(setting.started())
    output, error = setting.run()
    ((arguments, *_),) = setting.started()[before:]
    assert arguments[2] == "0" and arguments[-1] == "--c" and "3 done, 1 failed" in error
    output, error = setting.run(retry=True)
    assert not error and len(setting.started()) == before + 2


def test_a_kill_that_nobody_asked_for_is_a_failure(setting):
    """Most likely the memory was full, and so it would be the next time."""
    output, error = setting.run({"nnUNetTrainer 0": "die"})
    assert "3 done, 1 failed" in error and "fold_0 was killed; its machine may have too little memory." in output


def test_what_a_training_leaves_behind_is_ended(setting):
    setting.run({"nnUNetTrainer 0": "fork"}, folds=("0",))
    child = int(Path(f"{setting.orders}.child").read_text())
    for _ in range(100):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"{child} is alive")


def test_a_cascade_goes_on_when_its_first_stage_is_done(setting):
    setting.cascade = True
    output, error = setting.run()
    assert not error and [a[4] for a, *_ in setting.started()] == [TRAINERS[0]] * 2 + [TRAINERS[1]] * 2


def test_a_cascade_says_what_it_waits_for(setting):
    setting.cascade = True
    output, error = setting.run({"nnUNetTrainer 0": "fail"})
    assert "nnUNetTrainerLoMix__nnUNetPlans__2d/fold_0 waits for 3d_lowres of its trainer" in output
    assert "1 done, 1 failed, 2 missing" in error


def test_a_moment_without_an_answer_ends_nothing(setting, monkeypatch):
    answers = iter([True, True, False, False])

    def read(*arguments):
        if not next(answers, True):
            raise OSError("Stale file handle")
        return read_states(*arguments)

    monkeypatch.setattr("nnunet_lomix.experiments.display.read_states", read)
    monkeypatch.setattr("nnunet_lomix.experiments.display.SECONDS_BETWEEN_TABLES", 0)
    output, error = setting.run()
    assert not error and "4 done" in output


def test_one_training_at_a_time_on_each_gpu_and_a_results_folder_for_each_seed(setting):
    seeds = tuple(str(setting.folder / name) for name in ("a", "b"))
    _, error = setting.run(device="cuda", gpus=("1", "3"), results=seeds, options=("--npz",))
    assert not error
    started = setting.started()
    assert len(started) == 8 and {gpu for _, gpu, _ in started} == {"1", "3"}
    assert all("--npz" in arguments and arguments[8] == "cuda" for arguments, *_ in started)
    assert sorted(results for *_, results in started) == [seeds[0]] * 4 + [seeds[1]] * 4


def test_a_training_that_runs_elsewhere_is_left_alone(setting):
    folder = setting.experiment().list_trainings()[0].folder.path
    folder.mkdir(parents=True)
    process = hold_lock(folder, "training")
    output, error = setting.run()
    assert f"fold_0 is in use: training by process {process.pid}" in output
    assert "3 done, 1 running" in error and len(setting.started()) == 3
    # and one that another process starts in the very moment
    trainings = setting.experiment().list_trainings()
    second = job.start(trainings[0], setting.experiment(), {})
    assert second.wait() == job.IN_USE
    job.finish(trainings[0], setting.experiment(), second)
    assert (
        "is in use: training by process"
        in (setting.out / "logs/seed_0" / DATASET / "nnUNetTrainer__nnUNetPlans__2d/fold_0.log").read_text()
    )
    process.kill()
    process.wait()
    _, error = setting.run()
    assert not error


def test_a_training_by_hand_is_not_taken_for_the_last_one_that_held_the_lock(setting):
    setting.run()
    folder = setting.experiment().list_trainings()[0].folder.path
    shutil.rmtree(folder / "validation")
    log = next(folder.glob("training_log_*"))
    os.utime(log, (time.time() + 10,) * 2)
    output, error = setting.run()
    assert "fold_0 is in use: by hand, it seems, as its log is young." in output and "3 done, 1 running" in error


def test_two_experiments_into_one_folder(setting):
    setting.out.mkdir()
    process = hold_lock(setting.out, "nnunet_lomix run")
    _, error = setting.run()
    assert f"{setting.out} is in use: nnunet_lomix run by process {process.pid}" in error and not setting.started()
    process.kill()
    process.wait()


def test_an_interrupt_ends_what_runs(setting, monkeypatch):
    calls = iter(range(100))

    def interrupted(self):
        if next(calls) == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr("nnunet_lomix.experiments.display.Display.refresh", interrupted)
    _, error = setting.run({f"{trainer} {fold}": "hang" for trainer in TRAINERS for fold in "01"}, jobs=2)
    assert error == "Interrupted: nothing runs any more, and the same command goes on from here."
    assert len(setting.started()) == 2
    for training in setting.experiment().list_trainings()[:2]:
        assert "Epoch 0" in job.log_file(training, setting.out).read_text()
    monkeypatch.undo()


def test_the_exact_commands_are_printed(tmp_path):
    write_world(tmp_path)
    arguments = [
        "-d",
        "9",
        "-c",
        "2d",
        "-tr",
        "nnUNetTrainer",
        "nnUNetTrainerLoMix",
        "nnUNetTrainerLoMix_5epochs",
        "-f",
        "0",
        "1",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, **folders_below(tmp_path)}
    program = find_program("nnunet_lomix", str(Path(sys.executable).parent))
    command = [program, "run", *arguments, "--dry-run", "--out", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"nnUNetv2_train Dataset009_Toy 2d {fold} -tr nnUNetTrainerLoMix_5epochs -p nnUNetPlans -device cpu"
        for fold in (0, 1)
    ] + ["# 4 done, 2 missing"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "datasets, configurations, trainers must be given"),
        (["-d", "4", "-c", "2d", "-tr", "A", "--slurm", "gpu"], 2, "--slurm takes KEY=VALUE"),
        (["-d", "4", "-c", "2d", "-tr", "A", "--device", "cpu", "--gpus", "0"], 1, "gpus don't go with the device cpu"),
        (["none.yaml"], 2, "does not exist"),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments, code, sentence):
    result = CliRunner().invoke(main, ["run", *arguments])
    assert result.exit_code == code and sentence in result.output.replace("\n", " "), result.output


@pytest.mark.end_to_end
def test_from_raw_images_to_a_report_by_nnunets_own_commands(tmp_path):
    """One of the trainings is killed on the way; a second command ends what is missing."""
    nnunet = NnUNet(tmp_path)
    for folder in (nnunet.preprocessed, nnunet.results):
        folder.mkdir()
    write_dataset(nnunet.raw, 701, "classes")
    arguments = ["-d", "701", "-c", "2d", "-tr", "nnUNetTrainerTiny", "nnUNetTrainerLoMixTiny", "-f", "1"]
    program = find_program("nnunet_lomix", str(Path(sys.executable).parent))
    command = [program, "run", *arguments, "--device", "cpu", "--jobs", "2", "--out", tmp_path / "out"]
    environment = {**os.environ, **nnunet.variables, "TINY_EPOCHS": "5", "COLUMNS": "200"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    fold = nnunet.results / DATASET / "nnUNetTrainerLoMixTiny__nnUNetPlans__2d/fold_1"
    while not (fold / "checkpoint_best.pth").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "Interrupted" in output, output
    assert (fold / "checkpoint_latest.pth").exists()  # ours has saved itself

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "2 done" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / f"out/report/{DATASET}__nnUNetPlans__2d/report.html").is_file()
