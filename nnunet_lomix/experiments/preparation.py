"""What must be there before trainings start: plans, preprocessed data, folds, and trainers that take them."""

import shlex
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from nnunet_lomix.errors import LoMixError, shorten
from nnunet_lomix.experiments.training import State, States, Training
from nnunet_lomix.locks import Lock
from nnunet_lomix.nnunet.commands import run_command
from nnunet_lomix.nnunet.datasets import SPLITS, default_splits, require_root, write_splits
from nnunet_lomix.nnunet.planning import Command, find_first_stage, list_cases, list_missing, require_folds

# nnU-Net sets as many threads for planning as there are loaders in training, and some train without (0)
VARIABLES_OF_COMMANDS = {"nnUNet_n_proc_DA": None}


@dataclass(frozen=True)
class Preparation:
    """What the trainings on a dataset need before they can start."""

    dataset: str  # its name
    trainings: tuple[Training, ...]  # all of them

    @property
    def folder(self) -> Path:
        """Of the dataset in ``nnUNet_preprocessed``."""
        return require_root("nnUNet_preprocessed") / self.dataset

    def list_commands(self) -> list[Command]:
        """nnU-Net's commands for what is missing now, in order; a LoMixError if they can't make it."""
        return list_missing(self.dataset, [(t.plans, t.configuration) for t in self.trainings])

    def check(self) -> None:
        """Raise a LoMixError for an unknown trainer, fold or configuration, or a trainer that refuses its plans."""
        from nnunet_lomix.nnunet.refusals import require_trainable  # slow to import
        from nnunet_lomix.nnunet.trainer_lookup import look_up_trainer

        for trainer in dict.fromkeys(t.trainer for t in self.trainings):
            look_up_trainer(trainer)
        require_folds(self.dataset, [int(t.fold) for t in self.trainings if t.fold != "all"])
        self.list_commands()
        models = dict.fromkeys((t.trainer, t.plans, t.configuration) for t in self.trainings)
        for trainer, plans, configuration in models:
            if (self.folder / f"{plans}.json").is_file():
                require_trainable(trainer, self.dataset, plans, configuration)

    def run(self) -> None:
        """Run the commands, then write nnU-Net's folds, as trainings side by side would write them at the same time.

        Data that is there is left alone: trainings may be reading it.

        Raises:
            LoMixError: a command failed, the folder can't be written, the dataset has too few cases for folds, or a
                trainer refuses the plans.
        """
        if not self.list_commands() and not self._lacks_folds():
            return
        try:
            with Lock(self.folder, "preparing"):
                self._run_commands()
                if self._lacks_folds():
                    write_splits(self.folder, default_splits(self.folder))
        except OSError as error:
            raise LoMixError(
                f"{self.folder} can't be written ({error.strerror}), but something is missing there: let its owner "
                "prepare it, or copy it and set nnUNet_preprocessed."
            ) from None
        self.check()

    def _run_commands(self) -> None:
        logs = self.trainings[0].out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        number = 0
        while commands := self.list_commands():  # each may make the next ones superfluous
            print(shlex.join(commands[0]), flush=True)
            log = logs / f"{self.dataset}_{number}.log"
            run_command(commands[0], log, VARIABLES_OF_COMMANDS)
            number += 1
            if commands[0] in self.list_commands():
                raise LoMixError(f"{shlex.join(commands[0])} has not made what it should; its log is {log}.")

    def _lacks_folds(self) -> bool:
        return any(t.fold != "all" for t in self.trainings) and not (self.folder / SPLITS).exists()


class Todo(NamedTuple):
    """What is left of an experiment."""

    ready: list[Training]  # can start once they are prepared
    waiting: dict[Training, str]  # can't yet, and what they wait for
    preparations: list[Preparation]  # for both, one for each dataset


def find_todo(states: States, retry: bool = False, tried: Collection[Training] = ()) -> Todo:
    """What is to be run, failed trainings only with ``retry``, and nothing that has been tried.

    A LoMixError says that plans or folds are not nnU-Net's.
    """
    chosen = {State.MISSING, State.INTERRUPTED} | ({State.FAILED} if retry else set())
    obstacles = {t: find_obstacle(t) for t, state in states.items() if state in chosen and t not in tried}
    datasets: dict[str, list[Training]] = {}
    for training in obstacles:
        datasets.setdefault(training.dataset, []).append(training)
    return Todo(
        [training for training, obstacle in obstacles.items() if not obstacle],
        {training: obstacle for training, obstacle in obstacles.items() if obstacle},
        [Preparation(dataset, tuple(own)) for dataset, own in datasets.items()],
    )


def find_obstacle(training: Training) -> str:
    """What a second stage of a cascade waits for, as "3d_lowres of its trainer"; nothing if a training can start."""
    first = find_first_stage(training.dataset, training.plans, training.configuration)
    if first is None:
        return ""
    predicted = replace(training, configuration=first).model.path / "predicted_next_stage" / training.configuration
    cases = list_cases(training.dataset, training.plans, training.configuration, training.fold)
    lacking = sorted(cases - {file.stem for file in predicted.glob("*")})
    if cases and not lacking:
        return ""
    obstacle = f"{first} of its trainer, which must be trained and validated on all folds"
    return f"{obstacle}, and has not predicted {shorten(lacking)}" if lacking else obstacle
