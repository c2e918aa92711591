"""A short training of LoMix that is the same each time, and tells what it does. A folder for ``nnUNet_extTrainer``.

It appends a line of JSON to ``events.jsonl`` in its fold folder wherever it has got a little further: what it does
(``at``), how many epochs it has done (``position``, with the part of this one), and a digest of all that a training is
made of where an epoch has ended, behind ``checkpoint_latest.pth``, and where the training goes on after an
interruption. See ../faults.py.
"""

import hashlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_lomix.nnunet.results import LATEST
from nnunet_lomix.trainers import nnUNetTrainerLoMix

EVENTS = "events.jsonl"
TIMES = ("epoch_start_timestamps", "epoch_end_timestamps")  # all in nnU-Net's log that another run can't repeat


def digest(value: Any) -> str:
    """The same for two values only if they are the same to the last bit; in dictionaries without nnU-Net's times."""
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in TIMES:
                _feed(hasher, (key, item))
    elif isinstance(value, list | tuple):
        hasher.update(f"{len(value)} items".encode())
        for item in value:
            _feed(hasher, item)
    elif isinstance(value, torch.Tensor):
        hasher.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.detach().cpu().numpy().tobytes())
    else:
        hasher.update(repr(value).encode())


class nnUNetTrainerLoMixFaults(nnUNetTrainerLoMix):
    """Short epochs on one core; every step has random numbers of its own, whatever was before it."""

    seconds_between_checkpoints = 0.0  # after each epoch

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.configuration_manager.configuration["batch_size"] = 2
        self.num_epochs = int(os.environ["FAULTS_EPOCHS"])
        self.num_iterations_per_epoch = self.steps_an_epoch = 3
        self.num_val_iterations_per_epoch = 2
        self.finished_steps = 0  # of this epoch
        torch.set_num_threads(1)
        self.seed(0)

    def get_dataloaders(self) -> tuple[Iterator[dict], Iterator[dict]]:
        training, validation = super().get_dataloaders()
        return self.seeded(training), self.seeded(validation)

    def seeded(self, batches: Iterator[dict]) -> Iterator[dict]:
        while True:
            # the second batch of a validation has the numbers of the first one
            self.seed(1 + self.current_epoch * (self.steps_an_epoch + 1) + self.finished_steps)
            yield next(batches)

    @staticmethod
    def seed(number: int) -> None:
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.note("start")

    def train_step(self, batch: dict) -> dict:
        self.note("step")
        result = super().train_step(batch)
        self.finished_steps += 1
        return result

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.note("validation")

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        self.finished_steps = 0

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        self.note("end of the epoch", digest=self.digest())

    def save_checkpoint(self, filename: str) -> None:
        self.note(f"writing {os.path.basename(filename)}")
        super().save_checkpoint(filename)
        latest = os.path.basename(filename) == LATEST
        self.note(f"behind writing {os.path.basename(filename)}", **({"digest": self.digest()} if latest else {}))

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        self.note("resume", digest=self.digest())

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Left out: it can simply be repeated."""

    def digest(self) -> str:
        """Of network, loss, both optimisers, and what nnU-Net remembers of the epochs that have ended."""
        parts = (self.network, self.loss, self.optimizer, self.loss_optimizer)
        states = [part.state_dict() for part in parts if part is not None]
        log = {key: values[: self.current_epoch] for key, values in self.logger.get_checkpoint().items()}
        return digest([*states, log, self._best_ema, self.current_epoch])

    def note(self, at: str, **more: str) -> None:
        ended = len(self.logger.get_value("epoch_end_timestamps", None))  # nnU-Net counts an epoch later
        position = max(ended, self.current_epoch + self.finished_steps / self.steps_an_epoch)
        line = json.dumps({"at": at, "position": round(position, 3), **more}) + "\n"
        file = os.open(Path(self.output_folder, EVENTS), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line.encode())  # in one piece, so that a kill leaves whole lines
        os.close(file)
