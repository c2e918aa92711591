"""The state of a training, by the files that nnU-Net writes and what the experiment notes."""

import os
import time
from dataclasses import replace

import pytest

from nnunet_lomix.experiments.training import State, Training, describe_progress, read_state
from nnunet_lomix.locks import NAME as LOCK

LOG = "training_log_2026_1_2_03_04_05.txt"
LATER_LOG = "training_log_2026_1_2_03_04_06.txt"


@pytest.fixture
def training(tmp_path) -> Training:
    return Training("Dataset001_A", "2d", "nnUNetPlans", "nnUNetTrainer", "0", tmp_path / "results", tmp_path / "out")


def write(training: Training, name: str, seconds: float = 0, text: str = "") -> None:
    """Write a file of the fold folder that is some seconds younger than now."""
    file = training.folder.path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    os.utime(file, (time.time() + seconds,) * 2)


def state(training: Training, *jobs: str) -> State:
    return read_state(training, training.read_note(), jobs)


def test_states_of_trainings_by_hand(training):
    assert state(training) is State.MISSING
    for file, seconds, expected in (
        (LOG, -500, State.RUNNING),  # nnU-Net's own trainers hold no lock
        (LOG, -3600, State.INTERRUPTED),
        ("checkpoint_final.pth", 0, State.INTERRUPTED),  # not validated
        ("validation/summary.json", 0, State.DONE),
        ("checkpoint_final.pth", 1, State.INTERRUPTED),  # trained again
    ):
        write(training, file, seconds)
        assert state(training) is expected, file


def test_states_of_trainings_of_an_experiment(training, hold_lock):
    assert training.read_note() == {}
    training.write_note({"job": "12_3"})
    assert training.read_note() == {"job": "12_3", "folder": str(training.folder.path)}
    assert state(training, "12_3") is State.QUEUED and state(training, "12_4") is State.MISSING
    # the same experiment with another results folder is about another training
    other = replace(training, results=training.out / "other")
    assert other.note == training.note and other.read_note() == {}
    training.write_note({"exit": 1})
    assert state(training) is State.FAILED
    process = hold_lock(training.folder.path)
    assert state(training) is State.RUNNING
    process.kill()
    process.wait()
    owner = "a training of nnunet_lomix run by process 1 on there since then"
    write(training, LOG, 10)
    assert state(training) is State.FAILED  # one of our trainers, which would hold the lock
    # with another trainer, a log that is younger than the lock and the note is of a training by hand
    write(training, LOCK, 0, owner)
    assert state(training) is State.RUNNING
    # but an experiment touches the lock when a training of its own has ended
    write(training, LOCK, 20, owner)
    assert state(training) is State.FAILED
    for text in ("[1", "[1]"):
        training.note.write_text(text)
        assert training.read_note() == {} and state(training) is State.INTERRUPTED


def test_the_command_does_what_is_missing(training):
    options = ["-device", "cpu"]
    command = ["nnUNetv2_train", "Dataset001_A", "2d", "0", "-tr", "nnUNetTrainer", "-p", "nnUNetPlans", *options]
    pretrained = ["-pretrained_weights", "a.pth"]
    assert training.command([*options, *pretrained]) == [*command, *pretrained]
    write(training, "checkpoint_best.pth")
    # weights to start from belong to the start
    assert training.command([*options, *pretrained, "--npz"]) == [*command, "--npz", "--c"]
    write(training, "checkpoint_final.pth")
    assert training.command(options) == [*command, "--val"]


def test_progress_from_the_log(training):
    for file, seconds, text, progress in (
        (LOG, 0, "", ""),
        (LOG, 0, f"2026: Epoch 8 \n{'x' * 10_000}\n2026: Epoch 9 \n2026: Current learning rate: 0.1 \n", "epoch 10/?"),
        ("debug.json", 0, '{"num_epochs": "1000"}', "epoch 10/1000"),
        (LOG, 0, "2026: Epoch 999 \n2026: Training done. \n", "validation"),
        (LATER_LOG, -1, "", "validation"),  # another process was refused, as this one has the lock
        (LATER_LOG, 1, "Epoch 3 \n", "epoch 4/1000"),
    ):
        write(training, file, seconds, text)
        assert describe_progress(training.folder) == progress
