"""The commands ``run`` and ``status``."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments.display import Display, count, print_obstacles, print_states, tell
from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.local import ThisMachine
from nnunet_lomix.experiments.machine import Machine
from nnunet_lomix.experiments.preparation import find_obstacle, find_preparations
from nnunet_lomix.experiments.slurm import Slurm
from nnunet_lomix.experiments.training import ACTIVE, State, States, Training
from nnunet_lomix.locks import Lock


def show_status(experiment: Experiment, console: Console) -> None:
    """Print what is done, running, queued, interrupted, failed and missing.

    Raises:
        LoMixError: a dataset isn't there, a variable is not set, or SLURM doesn't answer.
    """
    states = _choose_machine(experiment).read_states()
    print_states(states, console)
    print_obstacles(states, console)


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
    machine = _choose_machine(experiment)
    machine.check(dry_run)
    _check_trainers(experiment)
    states = machine.read_states()
    unfinished = _find_unfinished(states, retry)
    for preparation in find_preparations(unfinished):
        preparation.check()
    if dry_run:
        _print_commands(machine, unfinished)
        print(f"# {count(states)}")
        return
    with _locked(experiment):
        try:
            states = _run(machine, console, retry)
        except KeyboardInterrupt:
            raise LoMixError(machine.interrupted) from None
        finally:
            machine.stop()
        _conclude(experiment, states, console)


def _run(machine: Machine, console: Console, retry: bool) -> States:
    """The loop: read the states, show them, start what can start; until nothing runs or can start any more.

    Returns:
        The states at the end.
    """
    tried: set[Training] = set()
    states: States | None = None
    with Display(console) as display:
        while True:
            try:
                states = machine.read_states()
            except (
                LoMixError,
                OSError,
            ) as error:  # a network or a scheduler that is away for a moment ends no training
                if states is None:
                    raise
                tell(f"{error} Looking again.", console)
                machine.wait()
                continue
            display.show(states)
            # nor is what somebody ends meanwhile, or takes out of a queue, started again by this command
            tried.update(training for training, state in states.items() if state in ACTIVE)
            unfinished = [training for training in _find_unfinished(states, retry) if training not in tried]
            # the second stage of a cascade may have become ready
            ready = [training for training in unfinished if not find_obstacle(training)]
            if ready:
                machine.submit(ready, find_preparations(unfinished))
                tried.update(ready)
            elif not machine.is_busy(states):
                return states
            machine.wait()


def _find_unfinished(states: States, retry: bool) -> list[Training]:
    """What this command has to run."""
    chosen = {State.MISSING, State.INTERRUPTED} | ({State.FAILED} if retry else set())
    return [training for training, state in states.items() if state in chosen]


def _choose_machine(experiment: Experiment) -> Machine:
    return ThisMachine(experiment) if experiment.slurm is None else Slurm(experiment)


def _check_trainers(experiment: Experiment) -> None:
    from nnunet_lomix.nnunet.trainer_lookup import look_up_trainer  # slow to import

    for trainer in experiment.trainers:
        look_up_trainer(trainer)
    for folder in experiment.results:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LoMixError(f"The results folder {folder} can't be made: {error.strerror}.") from None


def _locked(experiment: Experiment) -> Lock:
    try:
        return Lock(Path(experiment.out), "nnunet_lomix run")
    except OSError as error:
        raise LoMixError(f"{experiment.out} can't be written ({error.strerror}): choose another --out.") from None


def _print_commands(machine: Machine, unfinished: Sequence[Training]) -> None:
    """nnU-Net's commands, as a shell takes them."""
    for preparation in find_preparations(unfinished):
        for command in preparation.list_commands():
            print(shlex.join(command))
    usual = os.environ.get("nnUNet_results")
    ready = [training for training in unfinished if not find_obstacle(training)]
    for number, training in enumerate(ready):
        variables = {} if str(training.results) == usual else training.variables()
        words = [f"{name}={shlex.quote(value)}" for name, value in (variables | machine.variables(number)).items()]
        print(" ".join([*words, shlex.join(training.command(machine.options))]))


def _conclude(experiment: Experiment, states: States, console: Console) -> None:
    """Why trainings are not done, and the report of everything that is complete."""
    print_obstacles(states, console)
    for training in _find_unfinished(states, retry=True):
        obstacle = find_obstacle(training)
        if obstacle:
            tell(f"{training.name} waits for {obstacle}.", console)
    if len(experiment.trainers) > 1:
        _compare(experiment, states, console)
    if set(states.values()) != {State.DONE}:
        hint = "with --retry to try the failed ones again" if State.FAILED in states.values() else "to go on"
        raise LoMixError(f"Not all trainings are done ({count(states)}): run the same command again {hint}.")


def _compare(experiment: Experiment, states: States, console: Console) -> None:
    from nnunet_lomix.compare import compare_into, read_results  # slow to import

    groups: dict[tuple[str, str, str], list[State]] = {}
    for training, state in states.items():
        groups.setdefault((training.dataset, training.plans, training.configuration), []).append(state)
    for (dataset, plans, configuration), own in groups.items():
        if set(own) == {State.DONE}:
            folder = Path(experiment.out).absolute() / "report" / f"{dataset}__{plans}__{configuration}"
            try:
                source = read_results(
                    dataset, configuration, experiment.trainers, plans, experiment.folds, experiment.results
                )
                compare_into(folder, source, console, jobs=min(8, os.cpu_count() or 1))
            except LoMixError as error:  # the others have theirs
                tell(f"There is no report of {dataset} {plans} {configuration}: {error}", console)
