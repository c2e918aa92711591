"""The commands ``run`` and ``status``."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments.display import States, count, print_obstacles, print_states, read_states
from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.training import State, Training
from nnunet_lomix.locks import Lock

if TYPE_CHECKING:
    from nnunet_lomix.experiments.local import ThisMachine
    from nnunet_lomix.experiments.slurm import Slurm


def show_status(experiment: Experiment, console: Console) -> None:
    """Print what is done, running, queued, interrupted, failed and missing.

    Raises:
        LoMixError: a dataset isn't there, a variable is not set, or SLURM doesn't answer.
    """
    states = read_states(experiment)
    print_states(states, console)
    print_obstacles(states, experiment, console)


def run_experiment(experiment: Experiment, console: Console, retry: bool = False, dry_run: bool = False) -> None:
    """Run what is missing or interrupted, and compare the trainers when all is done.

    Args:
        experiment: which.
        console: where to print.
        retry: run failed trainings, too.
        dry_run: print nnU-Net's commands instead.

    Raises:
        LoMixError: something can't start, or not everything is done at the end.
    """
    from nnunet_lomix.experiments.preparation import find_preparations  # slow to import
    from nnunet_lomix.nnunet.trainer_lookup import look_up_trainer

    experiment = replace(experiment, out=str(Path(experiment.out).absolute()))
    machine = _choose_machine(experiment)
    experiment = machine.experiment
    for trainer in experiment.trainers:
        look_up_trainer(trainer)
    for folder in experiment.results:
        _require_folder(folder)
    if dry_run:
        states = read_states(experiment)
        todo, _ = _find_todo(states, retry)
        commands = [command for p in find_preparations(todo) for command in p.list_commands()]
        _print_commands(commands, todo, experiment, machine.slots)
        print(f"# {count(states)}")
        return
    with _locked(experiment):
        states = read_states(experiment)
        print_states(states, console)
        todo, _ = _find_todo(states, retry)
        tried: set[Training] = set()
        while todo or not tried:
            machine.run(todo, find_preparations(todo), console)
            tried.update(todo or states)
            # the second stage of a cascade may have become ready
            todo = [training for training in _find_todo(read_states(experiment), retry)[0] if training not in tried]
        _conclude(experiment, console)


def _find_todo(states: States, retry: bool) -> tuple[list[Training], dict[Training, str]]:
    """The trainings that can start, and those that wait for another configuration, with its name."""
    from nnunet_lomix.experiments.preparation import find_first_stage  # slow to import

    chosen = {State.MISSING, State.INTERRUPTED} | ({State.FAILED} if retry else set())
    stages = {training: find_first_stage(training) for training, state in states.items() if state in chosen}
    waiting = {training: first for training, first in stages.items() if first is not None}
    return [training for training in stages if training not in waiting], waiting


def _choose_machine(experiment: Experiment) -> "ThisMachine | Slurm":
    """Where the trainings run; its experiment has a device."""
    if experiment.slurm is not None:
        from nnunet_lomix.experiments.slurm import Slurm  # slow to import

        return Slurm(replace(experiment, device=experiment.device or "cuda"))
    from nnunet_lomix.experiments.local import ThisMachine, choose_device

    device = experiment.device or ("cuda" if experiment.gpus else choose_device())
    return ThisMachine(replace(experiment, device=device))


def _require_folder(folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoMixError(f"The results folder {folder} can't be made: {error.strerror}.") from None


def _locked(experiment: Experiment) -> Lock:
    try:
        return Lock(Path(experiment.out), "nnunet_lomix run")
    except OSError as error:
        raise LoMixError(f"{experiment.out} can't be written ({error.strerror}): choose another --out.") from None


def _print_commands(
    preparations: Sequence[Sequence[str]],
    trainings: Sequence[Training],
    experiment: Experiment,
    slots: Sequence[dict[str, str]],
) -> None:
    """nnU-Net's commands, as a shell takes them."""
    for command in preparations:
        print(shlex.join(command))
    usual = os.environ.get("nnUNet_results")
    for number, training in enumerate(trainings):
        variables = {} if str(training.results) == usual else training.variables()
        if slots:
            variables |= slots[number % len(slots)]
        words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        print(" ".join([*words, shlex.join(training.command(str(experiment.device), experiment.options))]))


def _conclude(experiment: Experiment, console: Console) -> None:
    """The states at the end, and the report of everything that is complete."""
    states = read_states(experiment)
    if console.is_terminal:
        print_states(states, console)
    else:  # each change has had its line
        console.print(count(states), highlight=False)
    print_obstacles(states, experiment, console)
    for training, first in _find_todo(states, retry=True)[1].items():
        text = f"{training.name} waits for {first} of its trainer, which must be trained and validated on all folds."
        console.print(text, highlight=False, soft_wrap=True)
    _compare(experiment, states, console)
    if set(states.values()) != {State.DONE}:
        hint = "with --retry to try the failed ones again" if State.FAILED in states.values() else "to go on"
        raise LoMixError(f"Not all trainings are done ({count(states)}): run the same command again {hint}.")


def _compare(experiment: Experiment, states: States, console: Console) -> None:
    from nnunet_lomix.compare import compare_into, read_results  # slow to import

    if len(experiment.trainers) < 2:
        return
    groups: dict[tuple[str, str, str], list[State]] = {}
    for training, state in states.items():
        groups.setdefault((training.dataset, training.plans, training.configuration), []).append(state)
    for (dataset, plans, configuration), own in groups.items():
        if set(own) == {State.DONE}:
            folder = Path(experiment.out) / "report" / f"{dataset}__{plans}__{configuration}"
            try:
                source = read_results(
                    dataset, configuration, experiment.trainers, plans, experiment.folds, experiment.results
                )
                compare_into(folder, source, console, jobs=min(8, os.cpu_count() or 1))
            except LoMixError as error:  # the others have theirs
                text = f"There is no report of {dataset} {plans} {configuration}: {error}"
                console.print(text, highlight=False, markup=False, soft_wrap=True)
