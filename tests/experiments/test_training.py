"""The state of a training, by the files that nnU-Net writes."""

import os
import time
from dataclasses import replace

import pytest

from nnunet_lomix.experiments.training import Record, State, Training, describe_progress, read_state
from nnunet_lomix.locks import NAME as LOCK

from .processes import hold_lock


@pytest.fixture
def training(tmp_path) -> Training:
    return Training("Dataset001_A", "2d", "nnUNetPlans", "nnUNetTrainer", "0", tmp_path / "results")


def write(training: Training, *names: str) -> None:
    for name in names:
        file = training.folder.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def grow_old(training: Training) -> None:
    (log,) = training.folder.path.glob("training_log_*")
    os.utime(log, (time.time() - 3600,) * 2)


LOG = "training_log_2026_1_2_03_04_05.txt"


def test_states_of_trainings_by_hand(training, tmp_path):
    assert read_state(training, tmp_path) is State.MISSING
    write(training, LOG)
    assert read_state(training, tmp_path) is State.RUNNING  # nnU-Net's own trainers hold no lock
    grow_old(training)
    assert read_state(training, tmp_path) is State.INTERRUPTED
    write(training, "checkpoint_final.pth")
    assert read_state(training, tmp_path) is State.INTERRUPTED  # not validated
    write(training, "validation/summary.json")
    assert read_state(training, tmp_path) is State.DONE


def test_states_of_trainings_of_an_experiment(training, tmp_path):
    record = Record.of(training, tmp_path)
    assert record.read() == {}
    record.write({"job": "12_3"})
    assert record.read() == {"job": "12_3", "folder": str(training.folder.path)}
    assert read_state(training, tmp_path, {"12_3"}) is State.QUEUED
    # the same experiment with another results folder is about another training
    other = replace(training, results=tmp_path / "other")
    assert Record.of(other, tmp_path).file == record.file and Record.of(other, tmp_path).read() == {}
    assert read_state(training, tmp_path, {"12_4"}) is State.MISSING
    record.write({"exit": 1})
    assert read_state(training, tmp_path) is State.FAILED
    process = hold_lock(training.folder.path, "training")
    assert read_state(training, tmp_path) is State.RUNNING
    process.kill()
    process.wait()
    write(training, LOG)
    log = training.folder.path / LOG
    os.utime(log, (time.time() + 10,) * 2)
    assert read_state(training, tmp_path) is State.FAILED  # one of our trainers, which would hold the lock
    # with another trainer, a log that is younger than the lock and the record is of a training by hand
    (training.folder.path / LOCK).write_text(
        '{"activity": "a training of nnunet_lomix run", "pid": 1, "host": "there", "since": 0}'
    )
    assert read_state(training, tmp_path) is State.RUNNING
    # but an experiment touches the lock when a training of its own has ended
    os.utime(training.folder.path / LOCK, (time.time() + 20,) * 2)
    assert read_state(training, tmp_path) is State.FAILED
    record.remove()
    assert read_state(training, tmp_path) is State.INTERRUPTED
    record.file.write_text("[1")
    assert record.read() == {} and read_state(training, tmp_path) is State.INTERRUPTED


def test_the_command_does_what_is_missing(training):
    command = [
        "nnUNetv2_train",
        "Dataset001_A",
        "2d",
        "0",
        "-tr",
        "nnUNetTrainer",
        "-p",
        "nnUNetPlans",
        "-device",
        "cpu",
    ]
    assert training.command("cpu") == command
    assert training.command("cpu", ["--npz"]) == [*command, "--npz"]
    write(training, "checkpoint_best.pth")
    assert training.command("cpu", ["--npz"]) == [*command, "--npz", "--c"]
    # weights to start from belong to the start
    assert training.command("cpu", ["-pretrained_weights", "a.pth", "--npz"]) == [*command, "--npz", "--c"]
    write(training, "checkpoint_final.pth")
    assert training.command("cpu") == [*command, "--val"]


def test_progress_from_the_log(training):
    log = training.folder.path / LOG
    assert describe_progress(training.folder) == ""
    write(training, LOG)
    assert describe_progress(training.folder) == ""
    log.write_text("2026: Epoch 8 \n" + "x" * 10_000 + "\n2026: Epoch 9 \n2026: Current learning rate: 0.1 \n")
    assert describe_progress(training.folder) == "epoch 10/?"
    (training.folder.path / "debug.json").write_text('{"num_epochs": "1000"}')
    assert describe_progress(training.folder) == "epoch 10/1000"
    log.write_text("2026: Epoch 999 \n2026: Training done. \n")
    assert describe_progress(training.folder) == "validation"
    # another process was refused, as this one has the lock
    refused = training.folder.path / "training_log_2026_1_2_03_04_06.txt"
    refused.touch()
    os.utime(refused, (log.stat().st_mtime - 1,) * 2)
    assert describe_progress(training.folder) == "validation"
    refused.write_text("Epoch 3 \n")
    os.utime(refused, (log.stat().st_mtime + 1,) * 2)
    assert describe_progress(training.folder) == "epoch 4/1000"
