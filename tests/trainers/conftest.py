"""Trainers in this process, on preprocessed generated data, on the device at hand."""

import itertools
import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_lomix.trainers import lomix, nnUNetTrainerLoMix

from ..conftest import DEVICE, LABELS


class Tiny:
    """Three epochs of two steps, on batches that depend on the epoch alone, so a resumed training sees the same."""

    samples = 4  # of a batch

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.configuration_manager.configuration["batch_size"] = self.samples
        self.num_epochs = 3
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2

    def on_epoch_end(self):
        self.logger.plot_progress_png = lambda folder: None  # takes longer than the epoch
        super().on_epoch_end()

    def get_dataloaders(self):
        self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        return iter(lambda: batch(self, self.current_epoch), None), iter(lambda: batch(self, 99), None)


class StockTiny(Tiny, nnUNetTrainer):
    pass


class LoMixTiny(Tiny, nnUNetTrainerLoMix):
    pass


def batch(trainer, seed):
    """Noise, and a target that follows it."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(trainer.samples, 1, *trainer.configuration_manager.patch_size, generator=generator)
    return {"data": data, "target": targets(trainer, (data > 0).float() + (data > 1))}


def targets(trainer, target):
    """As nnU-Net gives it: at the resolution of each output, if there are several."""
    strides = [[round(1 / s) for s in scale] for scale in trainer._get_deep_supervision_scales() or []]
    return [target[(..., *(slice(None, None, s) for s in stride))] for stride in strides] or target


@pytest.fixture
def make(prepared, tmp_path, monkeypatch, device):
    """Makes a trainer of a class; its results go to a folder of the test's own."""
    torch.set_num_threads(1)
    monkeypatch.setenv("nnUNet_compile", "f")  # on a GPU nnU-Net compiles, which takes longer than all tests
    monkeypatch.setattr(lomix, "plot_history", lambda *args: None)  # takes longer than the epoch, too

    def make_trainer(cls, labels="classes", configuration="2d", dataset_json=None, initialize=True, device=device):
        nnunet = prepared("classes")
        for name, value in {**nnunet.variables, "nnUNet_results": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        folder = nnunet.preprocessed / "Dataset701_classes"
        plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
        dataset_json = dataset_json or json.loads((folder / "dataset.json").read_text()) | {"labels": LABELS[labels]}
        torch.manual_seed(0)
        trainer = cls(plans, configuration, 0, dataset_json, device)
        if initialize:
            trainer.initialize()
        return trainer

    yield make_trainer
    logger = logging.getLogger("nnunet_lomix")
    logger.propagate = True
    for handler in [h for h in logger.handlers if isinstance(h, lomix.TrainingLog)]:
        logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def train_steps(trainer, steps=1):
    trainer.network.train()
    for step in range(steps):
        trainer.train_step(batch(trainer, step))


def log_of(trainer):
    return Path(trainer.log_file).read_text()


def send_behind(trainer, hook, call=1, number=signal.SIGTERM):
    """Have this process get a signal behind a call of one of nnU-Net's hooks."""
    own, calls = getattr(trainer, hook), itertools.count(1)

    def wrapped(*args):
        result = own(*args)
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return result

    setattr(trainer, hook, wrapped)


def assert_same(a, b):
    """Nested dictionaries and lists with bit-equal tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_training(a, b):
    """The states of two trainings that should be the same: bit for bit, but on a GPU, where the network's sums vary."""
    if DEVICE.type == "cpu":
        assert_same(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
