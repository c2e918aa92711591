"""The commands run and status: what is started, what is refused before, and what is told at the end."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nnunet_lomix.experiments import SCHEDULERS, Scheduler, machine
from nnunet_lomix.experiments.machine import Machine
from nnunet_lomix.nnunet.commands import find_program

from ..conftest import NnUNet, write_dataset
from ..fuzz.world import DATASET
from .conftest import TRAINERS, invoke, make_cascade


def test_all_is_run_once_and_what_is_done_gets_no_line_again(setting):
    output, error = setting.run(jobs=3)
    assert "There is no report of" in output  # as the script predicts nothing
    assert not error and "4 done" in output and f"{DATASET}/nnUNetTrainer__nnUNetPlans__2d/fold_1: missing" in output
    assert sorted((a[4], a[2]) for a, *_ in setting.started()) == [(t, f) for t in TRAINERS for f in "01"]
    output, error = setting.run()
    assert not error and len(setting.started()) == 4
    assert output.splitlines()[0] == "4 done" and "fold_" not in output


def test_what_was_killed_continues_and_what_failed_waits_for_retry(setting, monkeypatch):
    """Trainers of ours end with an exit status after a signal. A kill that nobody asked for is a failure: most likely
    the memory was full, and so it would be the next time."""
    one, other = TRAINERS
    output, error = setting.run({f"{one} 0": "stop", f"{one} 1": "fail", f"{other} 0": "save", f"{other} 1": "die"})
    assert error == (
        "Not all trainings are done (2 interrupted, 2 failed): run the same command again with --retry to try the "
        "failed ones again."
    )
    log = setting.out / "logs/seed_0" / DATASET / "nnUNetTrainer__nnUNetPlans__2d/fold_1.log"
    assert f"{DATASET}/nnUNetTrainer__nnUNetPlans__2d/fold_1 failed; the end of {log}:" in output
    assert "RuntimeError: no luck today" in output
    assert f"{other}__nnUNetPlans__2d/fold_1 was killed; its machine may have too little memory." in output
    monkeypatch.setenv("COLUMNS", "300")
    own = ("-d", DATASET, "-c", "2d", "-tr", *TRAINERS, "-f", 0, 1, "--out", setting.out)
    assert "no luck today" in invoke("status", *own)[1]

    output, error = setting.run()
    again = [arguments for arguments, *_ in setting.started()[4:]]
    assert [(a[4], a[2], a[-1]) for a in again] == [(one, "0", "--c"), (other, "0", "cpu")]
    assert "(2 done, 2 failed)" in error and "There is no report of" not in output  # before all is done it isn't tried
    output, error = setting.run(retry=True)
    assert not error and len(setting.started()) == 8


class Pbs(Machine):
    """A scheduler that loses all jobs."""

    def check(self, dry_run):
        pass

    def submit(self, todo):
        for training in todo.ready:
            training.write_note({"job": "12.server", "scheduler": "pbs"})


def test_another_scheduler_is_a_module_and_a_line(setting, monkeypatch):
    monkeypatch.setattr(machine, "SECONDS_BETWEEN_STATES", 0)
    monkeypatch.setitem(SCHEDULERS, "pbs", Scheduler(f"{__name__}:Pbs", "qsub", "walltime=1:00:00"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lost = f"its job 12.server has left PBS's queue before the end; what it wrote: {setting.out}/pbs"
    for entries, sentence in (
        ("pbs: {walltime: 1}", lost),
        ("pbs: {walltime: 1}\nslurm: {time: 1}", "slurm and pbs don't go together"),
        ("pbs: all", "pbs must be qsub's options, such as 'walltime: 1:00:00'"),
        ("device: cuda", "give the device cpu or mps, or options of SLURM or PBS."),
    ):
        assert sentence in invoke("run", setting.write_plan(entries))[1]


def test_a_cascade_says_what_it_waits_for_and_goes_on_when_its_first_stage_is_done(setting):
    """Also where the folds leave out a case that is preprocessed."""
    make_cascade(setting.dataset)
    (setting.dataset / "nnUNetPlans_2d/left_out.pkl").touch()
    cascade = {"configurations": ("3d_lowres", "3d_cascade_fullres"), "trainers": TRAINERS[:1]}
    output, error = setting.run({"nnUNetTrainer 0": "fail"}, **cascade)
    waits = "nnUNetTrainer__nnUNetPlans__3d_cascade_fullres/fold_1 waits for 3d_lowres of its trainer"
    assert f"{waits}, which must be trained and validated on all folds, and has not predicted a, b, c." in output
    assert "1 done, 1 failed, 2 missing" in error
    output, error = setting.run(retry=True, **cascade)
    assert not error and [a[1] for a, *_ in setting.started()[2:]] == ["3d_lowres", *["3d_cascade_fullres"] * 2]


def test_a_training_that_runs_elsewhere_is_left_alone(setting, hold_lock):
    process = hold_lock(setting.trainings()[0].folder.path)
    output, error = setting.run()
    assert f"fold_0 is in use: training by process {process.pid}" in output
    assert "3 done, 1 running" in error and len(setting.started()) == 3


def test_a_training_by_hand_is_not_taken_for_the_last_one_that_held_the_lock(setting):
    setting.run()
    folder = setting.trainings()[0].folder.path
    shutil.rmtree(folder / "validation")
    os.utime(next(folder.glob("training_log_*")), (time.time() + 10,) * 2)
    output, error = setting.run()
    assert "fold_0 is in use: by hand, it seems, as its log is young." in output and "3 done, 1 running" in error


def test_two_experiments_into_one_folder(setting, hold_lock):
    process = hold_lock(setting.out)
    _, error = setting.run()
    assert f"{setting.out} is in use: training by process {process.pid}" in error and not setting.started()


def test_the_status_of_many_planned_trainings_needs_no_torch(setting):
    code = "import sys; from nnunet_lomix.cli import main; main(sys.argv[1:], standalone_mode=False);"
    code += "assert not {'torch', 'submitit', 'nnunetv2.training'} & sys.modules.keys()"
    own = ["-d", DATASET, "-c", "2d", "-tr", *map(str, range(100)), "-f", *map(str, range(10))]
    own += ["--results", *(str(setting.folder / str(seed)) for seed in range(3)), "--slurm", "time=1"]
    done = subprocess.run([sys.executable, "-c", code, "status", *own], capture_output=True, text=True)
    assert done.stdout.endswith("\n3000 missing\n"), done.stderr


@pytest.mark.parametrize("place", ["out", "results"])
def test_a_folder_that_cannot_be_made(setting, place):
    (setting.folder / "file").touch()
    folder = str(setting.folder / "file/folder")
    _, error = setting.run(**{place: folder if place == "out" else (folder,)})
    assert f"{folder} can't be written (Not a directory): choose another --out or --results." == error


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trainers": ("nnUNetTrainerLoMx",)}, "Did you mean 'nnUNetTrainerLoMix'?"),
        (
            {"trainers": ("Somebodys",)},
            "no trainer Somebodys: 'nnunet_lomix info' lists ours and those of your folders.",
        ),
        ({"trainers": ("A,B",)}, "nnU-Net finds no trainer A,B: separate names by blanks."),
        ({"configurations": ("2D",)}, "no configuration 2D in its nnUNetPlans: there are 2d, 3d_fullres, 3d_lowres"),
        ({"folds": ("2",)}, "has the folds 0 to 1, not 2: leave"),
        ({"options": ("-pretrained_weights", __file__)}, "test_run.py is no checkpoint: "),
        ({"trainers": ("nnUNetTrainerLoMix",)}, "nnUNetTrainerLoMix mixes several decoder outputs, but this"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_printed_or_starts(setting, changes, sentence):
    make_cascade(setting.dataset)
    before = sorted(setting.folder.rglob("*"))
    output, error = setting.run(**changes)
    assert sentence in error and not output and not setting.started()
    assert sorted(setting.folder.rglob("*")) == sorted([*before, setting.orders])


def test_the_exact_commands_are_printed(setting):
    setting.run(folds=("0",))
    own = ("-d", DATASET, "-c", "2d", "-tr", *TRAINERS, "-f", 0, 1, "--device", "cpu", "--out", setting.folder / "new")
    code, output = invoke("run", *own, "--dry-run")
    assert code == 0 and output.splitlines() == [
        *(f"nnUNetv2_train {DATASET} 2d 1 -tr {trainer} -p nnUNetPlans -device cpu" for trainer in TRAINERS),
        "# 2 done, 2 missing",
    ]
    (setting.folder / "plan.yaml").write_text("options: [--val_best]")
    _, output = invoke("run", setting.folder / "plan.yaml", *own, "--npz", "--dry-run")
    assert output.splitlines()[0].endswith("--val_best --npz")
    assert not (setting.folder / "new").exists()


def test_wrong_arguments_get_one_sentence():
    for arguments, sentence in (
        ((), "datasets, configurations, trainers must be given"),
        (("--slurm", "time=1", "gpu"), "--slurm takes KEY=VALUE, such as partition=gpu, not 'gpu'."),
    ):
        code, output = invoke("run", *arguments)
        assert code == 2 and sentence in output.replace("\n", " "), output


@pytest.mark.end_to_end
def test_from_raw_images_to_a_report_by_nnunets_own_commands(tmp_path):
    """One of the trainings is killed on the way; a second command ends what is missing."""
    nnunet = NnUNet(tmp_path)
    for folder in (nnunet.preprocessed, nnunet.results):
        folder.mkdir()
    dataset = write_dataset(nnunet.raw, 701, "classes").name
    arguments = ["-d", "701", "-c", "2d", "-tr", "nnUNetTrainerTiny", "nnUNetTrainerLoMixTiny", "-f", "1"]
    program = find_program("nnunet_lomix", str(Path(sys.executable).parent))
    command = [program, "run", *arguments, "--device", "cpu", "--jobs", "2", "--out", tmp_path / "out"]
    environment = {**os.environ, **nnunet.variables, "TINY_EPOCHS": "5", "COLUMNS": "200"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    fold = nnunet.results / dataset / "nnUNetTrainerLoMixTiny__nnUNetPlans__2d/fold_1"
    while not (fold / "checkpoint_best.pth").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "Interrupted" in output, output
    assert (fold / "checkpoint_latest.pth").exists()  # ours has saved itself

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "2 done" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / f"out/report/{dataset}__nnUNetPlans__2d/report.html").is_file()
