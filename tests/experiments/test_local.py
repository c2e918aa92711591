"""Trainings on this machine: slots, GPUs, locks, and what an interrupt leaves."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from nnunet_lomix.experiments.job import IN_USE, finish, start
from nnunet_lomix.experiments.local import ThisMachine

from .conftest import TRAINERS


@pytest.fixture
def two_gpus(monkeypatch):
    """CUDA with two GPUs, as far as torch says."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_one_training_at_a_time_on_each_gpu_and_a_results_folder_for_each_seed(setting, two_gpus):
    seeds = tuple(str(setting.folder / name) for name in ("a", "b"))
    _, error = setting.run(device=None, results=seeds, options=("--npz",))
    assert not error
    started = setting.started()
    assert len(started) == 8 and {gpu for _, gpu, _ in started} == {"0", "1"}
    assert all("--npz" in arguments and arguments[8] == "cuda" for arguments, *_ in started)
    assert sorted(results for *_, results in started) == [seeds[0]] * 4 + [seeds[1]] * 4
    _, error = setting.run(gpus=("1",), device="cuda", results=(str(setting.folder / "c"),))
    assert not error and {gpu for _, gpu, _ in setting.started()[8:]} == {"1"}


def test_gpus_that_are_not_there_are_refused_once_and_before_anything_starts(setting, two_gpus, monkeypatch):
    _, error = setting.run(gpus=("0", "2"), device=None)
    assert error == "There is no GPU 2 here, but 0, 1: give these as gpus."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for changes in ({"gpus": ("0", "1"), "device": None}, {"device": "cuda"}):
        output, error = setting.run(**changes)
        assert "There is no GPU here that CUDA can use: give the device cpu" in error and not output
    assert not setting.started()


def test_without_a_gpu_it_is_the_cpu(setting, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert ThisMachine(setting.experiment(device=None, jobs=3)).slots == [{}] * 3
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert ThisMachine(setting.experiment(device=None)).device == "mps"


def test_what_a_training_leaves_behind_is_ended(setting):
    setting.run({"nnUNetTrainer 0": "fork"}, folds=("0",))
    child = int(Path(f"{setting.orders}.child").read_text())
    status = Path(f"/proc/{child}/stat")
    end = time.monotonic() + 10
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("held", ["by a training", "by a folder that is a file"])
def test_a_training_that_cannot_have_its_folder_says_so_in_its_log(setting, hold_lock, held):
    """One that another process starts in the very moment is no failure."""
    training = setting.trainings()[0]
    if held == "by a training":
        process = hold_lock(training.folder.path)
        sentence = f"is in use: training by process {process.pid}"
    else:
        training.model.path.mkdir(parents=True)
        training.folder.path.touch()
        sentence = f"{training.folder.path} can't be written (File exists)."
    process = start(training, [], {})
    assert (process.wait() == IN_USE) == (held == "by a training")
    finish(training, process)
    assert sentence in training.log.read_text() and ("exit" in training.read_note()) == (held != "by a training")


def test_an_interrupt_ends_what_runs(setting, capsys):
    def interrupt():
        while len(setting.started()) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    _, error = setting.run({f"{trainer} {fold}": "hang" for trainer in TRAINERS for fold in "01"}, jobs=2)
    assert error == "Interrupted: nothing runs any more, and the same command goes on from here."
    assert "Ending 2 trainings" in capsys.readouterr().out and len(setting.started()) == 2
    for training in setting.trainings()[:2]:
        assert "Epoch 0" in training.log.read_text() and not training.note.exists()
