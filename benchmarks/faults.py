"""Trainings that are killed at random moments, and continued until they have ended.

An uninterrupted training is the reference: it tells a digest of its state at the end of each epoch. Another one gets a
signal at a random moment and is started again, over and over; the moments are mostly while it trains, and often while
it writes a checkpoint. After each, every checkpoint must be readable. After a kill, what the next process loads, every
epoch that it ends, and the last checkpoints must be those of the reference, to the last bit. After SIGTERM the epoch
under way begins anew with the weights as they are, so what the next process loads must be what this one had.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_trainers.fault_trainers import EVENTS, digest
from results import Rows

from nnunet_lomix.demo.data import write_dataset
from nnunet_lomix.nnunet.checkpoints import STATE, read_checkpoint
from nnunet_lomix.nnunet.commands import folders_below, run_command, trainers_first

KEY = ("interruption",)
TRAINERS_FOLDER = Path(__file__).parent / "fault_trainers"
TRAINER = "nnUNetTrainerLoMixFaults"
DATASET = "Dataset903_Faults"
EPOCHS = 10
PATIENCE = 300.0  # seconds in which a training gets further, or something is wrong
TRAIN = "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
Event = dict[str, Any]


@dataclass(frozen=True)
class Moment:
    """When a signal is sent.

    Attributes:
        events: so many lines the training has written since it was started.
        writing: whether to go on until it begins to write a checkpoint.
        delay: and so many seconds later.
    """

    events: int = 0
    writing: bool = False
    delay: float = 0.0

    @classmethod
    def draw(cls, numbers: random.Random) -> "Moment":
        kind = numbers.random()
        if kind < 0.1:  # while Python imports, or the checkpoint is loaded
            return cls(delay=numbers.uniform(0, 8))
        if kind < 0.55:
            return cls(numbers.randint(1, 30), writing=True, delay=numbers.uniform(0, 0.1))
        return cls(numbers.randint(1, 30), delay=numbers.uniform(0, 0.3))

    def has_come(self, events: Sequence[Event]) -> bool:
        return len(events) >= self.events and (not self.writing or events[-1]["at"].startswith("writing"))


@dataclass
class Training:
    """A training in a results folder of its own; it is started again after each interruption."""

    results: Path
    dataset: str
    variables: Mapping[str, str]
    lives: list[list[Event]] = field(default_factory=list)  # the events of each process
    interruptions: list[list[Event]] = field(default_factory=list)  # those of them before the signal
    output: str = ""  # of the last process

    @property
    def fold(self) -> Path:
        return self.results / self.dataset / f"{TRAINER}__nnUNetPlans__2d" / "fold_0"

    def run(self, moment: Moment | None = None, number: int = signal.SIGKILL) -> int:
        """Start or continue it, and send it a signal; gives its exit status, as :class:`subprocess.Popen` does."""
        before = len(self._read_events())
        command = [sys.executable, "-c", TRAIN, self.dataset, "2d", "0", "-tr", TRAINER, "-device", "cpu", "--c"]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                command, env={**self.variables, "nnUNet_results": str(self.results)}, stdout=log, stderr=log
            )
            try:
                if moment is not None and self._wait(process, moment, before):
                    time.sleep(moment.delay)
                    self.interruptions.append(self._read_events()[before:])
                    process.send_signal(number)
                status = process.wait(PATIENCE)
            finally:
                process.kill()
                process.wait()
            log.seek(0)
            self.output = log.read()
        self.lives.append(self._read_events()[before:])
        return status

    def _wait(self, process: subprocess.Popen, moment: Moment, before: int) -> bool:
        """Until the moment has come; False if the process has ended before."""
        limit = time.monotonic() + PATIENCE
        while not moment.has_come(self._read_events()[before:]):
            if process.poll() is not None:
                return False
            if time.monotonic() > limit:
                raise TimeoutError(f"The training is stuck:\n{self.output}")
            time.sleep(0.002)
        return True

    def _read_events(self) -> list[Event]:
        file = self.fold / EVENTS
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def read_all_checkpoints(self) -> dict[str, dict[str, Any]]:
        """Each checkpoint that is there, by the name of its file.

        Raises:
            CheckpointError: one is damaged.
        """
        return {file.name: read_checkpoint(file) for file in sorted(self.fold.glob("checkpoint_*.pth"))}

    def digests(self) -> dict[str, str]:
        """Of the checkpoints of a training that has ended, without the times in them."""
        parts = ("network_weights", "optimizer_state", "logging", "_best_ema", "current_epoch", STATE)
        return {name: digest([c[part] for part in parts]) for name, c in self.read_all_checkpoints().items()}


def measure(kills: int, terms: int, seed: int = 0) -> Rows:
    """A row for each signal: ``kills`` times SIGKILL, ``terms`` times SIGTERM, at moments drawn by the seed.

    The columns: ``signal``; ``exit``, the status; ``moment``, what the training did; ``unfinished``, the parts of a
    checkpoint that it left; ``resumed_from``, in epochs, as ``epochs_lost``, which are trained again; ``equal``,
    whether nothing else was lost.
    """
    with tempfile.TemporaryDirectory() as folder:
        variables = prepare(Path(folder), EPOCHS)
        reference = Training(Path(folder, "reference"), DATASET, variables)
        if reference.run() != 0:
            raise RuntimeError(reference.output)
        numbers = random.Random(seed)
        rows: Rows = []
        for number, count in ((signal.SIGKILL, kills), (signal.SIGTERM, terms)):
            plan = [(Moment.draw(numbers), number) for _ in range(count)]
            while plan:
                training = Training(Path(folder, f"results_{len(rows)}"), DATASET, variables)
                rows += judge(interrupt(training, plan), training, reference)
                print(f"{len(rows)} of {kills + terms} signals", file=sys.stderr)
                shutil.rmtree(training.results)
        return [{"interruption": i, **row} for i, row in enumerate(rows, 1)]


def interrupt(training: Training, plan: list[tuple[Moment, signal.Signals]]) -> Rows:
    """Run a training to its end; gives a row for each signal that it gets, which is taken out of the plan.

    Raises:
        CheckpointError: a checkpoint is damaged.
        RuntimeError: a process ended by itself, but not well.
    """
    rows: Rows = []
    while (status := training.run(*plan[0] if plan else ())) != 0:
        moment, number = plan.pop(0) if plan else (None, signal.SIGKILL)
        if moment is None or status not in (-number, 128 + number):
            raise RuntimeError(f"The training failed:\n{training.output}")
        training.read_all_checkpoints()
        unfinished = sorted(file.name for file in training.fold.glob("checkpoint_*.tmp*"))
        rows.append({"signal": number.name, "exit": status, "unfinished": ", ".join(unfinished)})
    return rows


def judge(rows: Rows, training: Training, reference: Training) -> Rows:
    """The rows of a training that has ended, all of one signal, with what was lost."""
    same_end = training.digests() == reference.digests()
    states = {event["position"]: event["digest"] for event in reference.lives[0] if "digest" in event}
    for i, row in enumerate(rows):
        life, after = training.interruptions[i], next(filter(None, training.lives[i + 1 :]))
        resumed = after[0]["position"]
        row["moment"] = f"{life[-1]['at']}, {life[-1]['position']:.2f} epochs" if life else "before it trained"
        row["resumed_from"] = resumed
        row["epochs_lost"] = max(0.0, round(life[-1]["position"] - resumed, 3)) if life else 0.0
        if row["signal"] == signal.SIGTERM.name:
            written = [event["digest"] for life in training.lives[: i + 1] for event in life if "digest" in event]
            row["equal"] = written[-1:] == [event["digest"] for event in after[:1] if "digest" in event]
        else:
            # before the first epoch has ended there is nothing to compare with
            digests = [(e["position"], e["digest"]) for e in after if "digest" in e and e["position"] in states]
            row["equal"] = same_end and all(states[position] == digest for position, digest in digests)
    return rows


def prepare(folder: Path, epochs: int) -> dict[str, str]:
    """A small dataset, planned and preprocessed; gives the variables of a training."""
    variables = {
        **folders_below(folder),
        **trainers_first(TRAINERS_FOLDER),
        "nnUNet_n_proc_DA": "1",
        "OMP_NUM_THREADS": "1",
    }
    write_dataset(folder / "raw" / DATASET, [64, 64], 10, 0)
    plan = ["nnUNetv2_plan_and_preprocess", "-d", 903, "-c", "2d", "-npfp", 1, "-np", 1]
    run_command(plan, folder / "plan.log", variables)
    return training_variables(variables, epochs)


def training_variables(variables: Mapping[str, str], epochs: int) -> dict[str, str]:
    """Those of a training that is the same each time."""
    return {
        **os.environ,
        **variables,
        **trainers_first(TRAINERS_FOLDER),
        "nnUNet_n_proc_DA": "0",
        "FAULTS_EPOCHS": str(epochs),
        "PYTHONUNBUFFERED": "1",
    }
