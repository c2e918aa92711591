"""One training of an experiment: where it is, how it is started, and how far it is."""

import json
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from nnunet_lomix.files import replacing
from nnunet_lomix.locks import NAME as LOCK
from nnunet_lomix.locks import describe_owner, is_locked
from nnunet_lomix.nnunet.results import FoldFolder, ModelFolder

# A training by nnU-Net's own trainers that was started by hand holds no lock. It is taken to run as long as its log
# is younger than this; an epoch writes several lines. So is one of an experiment that was killed with its machine.
SECONDS_OF_SILENCE = 600
ACTIVITIES = ("training by ", "validation by ")  # for which our trainers themselves take the lock of a fold folder
PRETRAINED = "-pretrained_weights"
LAST_BYTES = 4096  # of a log, where the last epoch is looked for
Note = Mapping[str, str | int]


class State(Enum):
    """How far a training is."""

    DONE = "done"  # trained and validated
    RUNNING = "running"
    QUEUED = "queued"  # by a scheduler
    INTERRUPTED = "interrupted"  # it can be continued
    FAILED = "failed"  # nnU-Net ended it with an error
    MISSING = "missing"


ACTIVE = (State.RUNNING, State.QUEUED)


@dataclass(frozen=True)
class Training:
    """A trainer on a fold."""

    dataset: str  # its name; the next four as in nnU-Net's commands
    configuration: str
    plans: str
    trainer: str
    fold: str
    results: Path  # what nnUNet_results names for it
    out: Path  # the experiment's folder
    seed: int = 0  # number of the results folder within the experiment

    @property
    def model(self) -> ModelFolder:
        return ModelFolder.of(self.results, self.dataset, self.trainer, self.plans, self.configuration)

    @property
    def folder(self) -> FoldFolder:
        return self.model.fold(self.fold)

    @property
    def name(self) -> str:
        """For messages: the folders that tell it apart."""
        seed = f" of seed {self.seed}" if self.seed else ""
        return f"{self.dataset}/{self.model.path.name}/fold_{self.fold}{seed}"

    @property
    def log(self) -> Path:
        """Where the output of nnU-Net's commands is appended."""
        folder = self.folder.path
        return self.out / f"logs/seed_{self.seed}" / self.dataset / folder.parent.name / f"{folder.name}.log"

    @property
    def note(self) -> Path:
        """What the experiment notes of it: its job in a queue, or with what exit status nnU-Net failed."""
        return self.log.with_suffix(".json")

    def read_note(self) -> Note:
        """``job``, with ``after`` for the job that it waits for and ``scheduler``, or ``exit``; or nothing.

        A note of the same experiment with another results folder is about another training, and isn't read.
        """
        try:
            content = json.loads(self.note.read_text())
        except (OSError, ValueError):
            return {}
        mine = isinstance(content, dict) and content.get("folder") == str(self.folder.path.absolute())
        return content if mine else {}

    def write_note(self, content: Note) -> None:
        self.note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.note) as temporary:
            temporary.write_text(json.dumps({"folder": str(self.folder.path.absolute()), **content}))

    def command(self, options: Sequence[str]) -> list[str]:
        """nnU-Net's command that brings it further from where it is now, with further arguments of nnUNetv2_train."""
        arguments = [self.dataset, self.configuration, self.fold, "-tr", self.trainer, "-p", self.plans]
        continued = ["--c"] if self.folder.last_checkpoint() else []
        step = ["--val"] if self.folder.is_finished() else continued
        if step and PRETRAINED in options:  # belongs to the beginning, and nnU-Net refuses it later
            at = options.index(PRETRAINED)
            options = [*options[:at], *options[at + 2 :]]
        return ["nnUNetv2_train", *arguments, *options, *step]

    def variables(self) -> dict[str, str]:
        """nnU-Net's variable for the results folder; the others are those of the process."""
        return {"nnUNet_results": str(self.results)}


States = Mapping[Training, State]


def read_state(training: Training, note: Note, jobs: Collection[str]) -> State:
    """How far a training is, by the files that nnU-Net has written, whoever started it.

    The note is that of the experiment; the jobs are what a scheduler has in its queue, waiting or running.
    """
    if training.folder.is_validated():
        return State.DONE
    folder = training.folder.path
    started = folder.is_dir()
    if started and is_locked(folder):
        return State.RUNNING
    if note.get("job") in jobs:
        return State.QUEUED
    log = last_log(training.folder) if started else None
    # where our trainers have been, who runs holds the lock
    ours = log is not None and describe_owner(folder).startswith(ACTIVITIES)
    if log and not ours and _is_alive(log, [folder / LOCK, training.note]):
        return State.RUNNING
    if "exit" in note:
        return State.FAILED
    return State.INTERRUPTED if log or training.folder.last_checkpoint() else State.MISSING


def _is_alive(log: Path, ends: Sequence[Path]) -> bool:
    """Whether a log is young, and none of the files is younger that are written when a training ends."""
    written = log.stat().st_mtime
    ended = max((file.stat().st_mtime for file in ends if file.exists()), default=0.0)
    return written > ended and time.time() - written < SECONDS_OF_SILENCE


def last_log(folder: FoldFolder) -> Path | None:
    """nnU-Net's log of a training that was last written to; a process that was refused has left one, too."""
    return max(folder.path.glob("training_log_*.txt"), key=os.path.getmtime, default=None)


def describe_progress(folder: FoldFolder) -> str:
    """Where a running training is, from nnU-Net's log and debug.json; nothing if they don't say.

    >>> describe_progress(FoldFolder(Path("missing")))
    ''
    """
    log = last_log(folder)
    if log is None:
        return ""
    with log.open("rb") as file:
        file.seek(max(0, os.path.getsize(log) - LAST_BYTES))
        end = file.read().decode(errors="replace")
    if "Training done." in end:
        return "validation"
    epochs = re.findall(r"Epoch (\d+)", end)
    try:
        total = json.loads((folder.path / "debug.json").read_text())["num_epochs"]
    except (OSError, ValueError, KeyError, TypeError):
        total = "?"
    return f"epoch {int(epochs[-1]) + 1}/{total}" if epochs else ""
