"""The commands ``run`` and ``status``."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments.display import States, count, print_failures, print_states, read_states
from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.training import Record, State, Training
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
    print_failures(states, experiment, console)


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
    from nnunet_lomix.experiments.preparation import find_preparations, leave_out_waiting  # slow to import
    from nnunet_lomix.nnunet.trainer_lookup import look_up_trainer

    experiment = replace(experiment, out=str(Path(experiment.out).absolute()))
    machine = _choose_machine(experiment)
    experiment = machine.experiment
    for trainer in experiment.trainers:
        look_up_trainer(trainer)
    states = read_states(experiment)
    chosen = {State.MISSING, State.INTERRUPTED} | ({State.FAILED} if retry else set())
    todo = leave_out_waiting([training for training, state in states.items() if state in chosen])
    preparations = find_preparations(todo)
    if dry_run:
        _print_commands([command for p in preparations for command in p.commands], todo, experiment, machine.slots)
        return
    with _locked(experiment):
        for training in todo:
            Record.of(training, Path(experiment.out)).remove()
        print_states(states, console)
        machine.run(todo, preparations, console)
        _conclude(experiment, console)


def _choose_machine(experiment: Experiment) -> "ThisMachine | Slurm":
    """Where the trainings run; its experiment has a device."""
    if experiment.slurm is not None:
        from nnunet_lomix.experiments.slurm import Slurm  # slow to import

        return Slurm(replace(experiment, device=experiment.device or "cuda"))
    from nnunet_lomix.experiments.local import ThisMachine, choose_device

    device = experiment.device or ("cuda" if experiment.gpus else choose_device())
    return ThisMachine(replace(experiment, device=device))


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
    print_failures(states, experiment, console)
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
            source = read_results(
                dataset, configuration, experiment.trainers, plans, experiment.folds, experiment.results
            )
            compare_into(folder, source, console, jobs=min(8, os.cpu_count() or 1))
