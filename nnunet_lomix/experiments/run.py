"""The commands ``run`` and ``status``."""

import os
import pkgutil
import shlex
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments import SCHEDULERS
from nnunet_lomix.experiments.display import count, print_obstacles, print_states, tell
from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.local import ThisMachine
from nnunet_lomix.experiments.machine import Machine
from nnunet_lomix.experiments.preparation import Todo, find_todo
from nnunet_lomix.experiments.training import PRETRAINED, State, States
from nnunet_lomix.locks import Lock


def show_status(experiment: Experiment, console: Console) -> None:
    """Print what is done, running, queued, interrupted, failed and missing; a LoMixError if that can't be known."""
    states = _choose_machine(experiment).read_states()
    print_states(states, console)
    print_obstacles(states, {}, console, experiment.schedulers)


def run_experiment(experiment: Experiment, console: Console, retry: bool = False, dry_run: bool = False) -> None:
    """Run what is missing or interrupted, with ``retry`` what failed, too; and compare the trainers when all is done.

    A dry run prints nnU-Net's commands instead.

    Raises:
        LoMixError: something can't start, or not everything is done at the end.
    """
    machine = _choose_machine(experiment)
    machine.check(dry_run)
    states = machine.read_states()
    todo = find_todo(states, retry)
    if todo.ready and PRETRAINED in experiment.options:
        from nnunet_lomix.nnunet.checkpoints import require_pretrained  # slow to import

        require_pretrained(experiment.options[experiment.options.index(PRETRAINED) + 1])
    for preparation in todo.preparations:
        preparation.check()
    if dry_run:
        print(*_list_commands(machine, todo), f"# {count(states)}", sep="\n")
        return
    with _claim_folders(experiment):
        states, waiting = machine.run(console, retry)
        print_obstacles(states, waiting, console, experiment.schedulers)
        if len(experiment.trainers) > 1:
            _compare(experiment, states, console)
    if set(states.values()) != {State.DONE}:
        hint = "with --retry to try the failed ones again" if State.FAILED in states.values() else "to go on"
        raise LoMixError(f"Not all trainings are done ({count(states)}): run the same command again {hint}.")


def _choose_machine(experiment: Experiment) -> Machine:
    if not experiment.schedulers:
        return ThisMachine(experiment)
    (name,) = experiment.schedulers
    machine: Machine = pkgutil.resolve_name(SCHEDULERS[name].machine)(experiment)
    return machine


def _claim_folders(experiment: Experiment) -> Lock:
    """Make the folders of an experiment, and have its own for this process alone."""
    try:
        for folder in experiment.results:
            Path(folder).mkdir(parents=True, exist_ok=True)
        return Lock(Path(experiment.out), "nnunet_lomix run")
    except OSError as error:
        place = error.filename or experiment.out
        raise LoMixError(f"{place} can't be written ({error.strerror}): choose another --out or --results.") from None


def _list_commands(machine: Machine, todo: Todo) -> Iterator[str]:
    """nnU-Net's commands, as a shell takes them."""
    for preparation in todo.preparations:
        yield from map(shlex.join, preparation.list_commands())
    usual = os.environ.get("nnUNet_results")
    for number, training in enumerate(todo.ready):
        variables = {} if str(training.results) == usual else training.variables()
        words = [f"{name}={shlex.quote(value)}" for name, value in (variables | machine.variables(number)).items()]
        yield " ".join([*words, shlex.join(training.command(machine.options))])


def _compare(experiment: Experiment, states: States, console: Console) -> None:
    """The report of everything that is complete."""
    from nnunet_lomix.compare import compare_into, read_results  # slow to import

    groups: dict[tuple[str, str, str], set[State]] = {}
    for training, state in states.items():
        groups.setdefault((training.dataset, training.plans, training.configuration), set()).add(state)
    for dataset, plans, configuration in (group for group, found in groups.items() if found == {State.DONE}):
        folder = Path(experiment.out).absolute() / "report" / f"{dataset}__{plans}__{configuration}"
        try:
            own = (experiment.trainers, plans, experiment.folds, experiment.results)
            source = read_results(dataset, configuration, *own)
            compare_into(folder, source, console, jobs=min(8, os.cpu_count() or 1))
        except LoMixError as error:  # the others have theirs
            tell(f"There is no report of {dataset} {plans} {configuration}: {error}", console)
