"""What the terminal shows of an experiment: a table of states that changes, or a line for each change."""

import signal
import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.training import Record, State, Training, describe_progress, log_file, read_state
from nnunet_lomix.locks import describe_owner, is_locked

LAST_LINES = 15  # of the log of a failed training
SECONDS_BETWEEN_TABLES = 2
ROWS = 40  # of a table; of more models the trainings are counted
STYLES = {
    State.DONE: "green",
    State.RUNNING: "cyan",
    State.QUEUED: "blue",
    State.INTERRUPTED: "yellow",
    State.FAILED: "red",
    State.MISSING: "dim",
}
States = Mapping[Training, State]


def describe(training: Training, state: State) -> str:
    """A state, with the epoch of what is running."""
    progress = describe_progress(training.folder) if state is State.RUNNING else ""
    return f"{state.value}, {progress}" if progress else state.value


def count(states: States) -> str:
    """
    >>> count({})
    'no trainings'
    """
    counts = Counter(states.values())
    return ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state]) or "no trainings"


def make_table(states: States) -> Table:
    """A row for each model, a column for each fold."""
    trainings = list(states)
    rows: dict[tuple[str, ...], dict[str, Training]] = {}
    for training in trainings:
        rows.setdefault(_key(training), {})[training.fold] = training
    folds = list(dict.fromkeys(t.fold for t in trainings))
    # what all have in common is said once, in the title
    heads = ("dataset", "configuration", "plans", "trainer", "seed")
    shown = [i for i, head in enumerate(heads) if head == "trainer" or len({row[i] for row in rows}) > 1]
    common = [key for i, key in enumerate(next(iter(rows), ())) if i not in shown and heads[i] != "seed"]
    table = Table(title=" ".join(common), caption=count(states), title_justify="left", caption_justify="left")
    for i in shown:
        table.add_column(heads[i])
    for fold in folds:
        table.add_column(f"fold {fold}")
    for row, own in rows.items():
        cells = [_cell(own.get(fold), states) for fold in folds]
        table.add_row(*(Text(row[i]) for i in shown), *cells)
    return table


def _key(training: Training) -> tuple[str, ...]:
    return training.dataset, training.configuration, training.plans, training.trainer, str(training.seed)


def _cell(training: Training | None, states: States) -> Text:
    if training is None:
        return Text()
    return Text(describe(training, states[training]), STYLES[states[training]])


def read_states(experiment: Experiment) -> dict[Training, State]:
    """The states of all trainings, now.

    Raises:
        LoMixError: a dataset isn't there, a variable is not set, or SLURM doesn't answer.
    """
    jobs: Collection[str] = ()
    if experiment.slurm is not None:
        from nnunet_lomix.experiments.slurm import list_queue  # slow to import

        jobs = list_queue()
    out = Path(experiment.out)
    return {training: read_state(training, out, jobs) for training in experiment.list_trainings()}


class Display:
    """The states of all trainings: a table that changes in a terminal, elsewhere a line for each change."""

    def __init__(self, experiment: Experiment, console: Console, seconds: float = SECONDS_BETWEEN_TABLES) -> None:
        self.experiment = experiment
        self.console = console
        self.seconds = seconds
        self.states = read_states(experiment)
        self._read_at = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        self._show({})
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def refresh(self) -> None:
        """Read and show the states, if that was not just done."""
        if time.monotonic() - self._read_at < self.seconds:
            return
        before, self._read_at = self.states, time.monotonic()
        try:
            self.states = read_states(self.experiment)
        except (LoMixError, OSError) as error:  # a network or a scheduler that is away for a moment ends no training
            _print(f"{error} Looking again.", self.console)
            return
        self._show(before)

    def _show(self, before: States) -> None:
        if self._live:
            self._live.update(_table_or_count(self.states), refresh=True)
            return
        for training, state in self.states.items():
            if before and state is not before.get(training):
                _print_line(training, state, self.console)


def _table_or_count(states: States) -> Table | str:
    return make_table(states) if len({t.model for t in states}) <= ROWS else count(states)


def print_states(states: States, console: Console) -> None:
    """A table in a terminal, elsewhere a line for each training."""
    if console.is_terminal:
        console.print(_table_or_count(states))
    else:
        for training, state in states.items():
            _print_line(training, state, console)
        console.print(count(states), highlight=False)


def _print_line(training: Training, state: State, console: Console) -> None:
    _print(f"{training.name}: {describe(training, state)}", console)


def _print(text: str, console: Console) -> None:
    """A line as it is, whatever a path or somebody else's log contains."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_obstacles(states: States, experiment: Experiment, console: Console) -> None:
    """Why trainings are not done: the ends of logs, who else works on them, jobs that SLURM ended without a word."""
    out = Path(experiment.out)
    for training, state in states.items():
        record = Record.of(training, out).read()
        if state is State.FAILED:
            log = log_file(training, out)
            if record.get("exit") in (-signal.SIGKILL, 128 + signal.SIGKILL):
                _print(f"{training.name} was killed; its machine may have too little memory.", console)
            _print(f"{training.name} failed; the end of {log}:", console)
            lines = [line for line in _read_text(log).splitlines() if line.strip()]
            for line in lines[-LAST_LINES:]:
                _print(f"    {line}", console)
        elif state is State.RUNNING:
            # without a lock there is only a young log, and the last owner of the lock may be long gone
            folder = training.folder.path
            who = describe_owner(folder) if is_locked(folder) else "by hand, it seems, as its log is young"
            _print(f"{training.name} is in use: {who}.", console)
        elif "job" in record and state in (State.INTERRUPTED, State.MISSING):
            text = f"{training.name}: its job {record['job']} has left SLURM's queue before the end; what it wrote"
            if "after" in record:
                text += f", or job {record['after']}, which had to prepare the dataset"
            _print(f"{text}: {out / 'slurm'}", console)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
