"""What the terminal shows of an experiment: a table of states that changes, elsewhere a line for each change."""

import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nnunet_lomix.experiments.training import State, States, Training, describe_progress
from nnunet_lomix.locks import describe_owner, is_locked
from nnunet_lomix.nnunet.commands import read_log

LAST_LINES = 15  # of the log of a failed training
ROWS = 40  # of a table; of more models the trainings are counted
STYLES = {
    State.DONE: "green",
    State.RUNNING: "cyan",
    State.QUEUED: "blue",
    State.INTERRUPTED: "yellow",
    State.FAILED: "red",
    State.MISSING: "dim",
}


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
    rows: dict[tuple[str, ...], dict[str, Text]] = {}
    for training, state in states.items():
        key = (training.dataset, training.configuration, training.plans, training.trainer, str(training.seed))
        rows.setdefault(key, {})[training.fold] = Text(describe(training, state), STYLES[state])
    folds = list(dict.fromkeys(training.fold for training in states))
    # what all have in common is said once, in the title
    heads = ("dataset", "configuration", "plans", "trainer", "seed")
    shown = [i for i, head in enumerate(heads) if head == "trainer" or len({row[i] for row in rows}) > 1]
    common = [key for i, key in enumerate(next(iter(rows), ())) if i not in shown and heads[i] != "seed"]
    table = Table(title=" ".join(common), caption=count(states), title_justify="left", caption_justify="left")
    for head in [*(heads[i] for i in shown), *(f"fold {fold}" for fold in folds)]:
        table.add_column(head)
    for row, cells in rows.items():
        table.add_row(*(Text(row[i]) for i in shown), *(cells.get(fold, Text()) for fold in folds))
    return table


@contextmanager
def showing(console: Console) -> Iterator[Callable[[States], None]]:
    """Gives a function that shows states as they change; what is done already when it begins gets no line."""
    shown: States = {}

    def print_changes(states: States) -> None:
        nonlocal shown
        _print_lines({t: s for t, s in states.items() if s is not shown.get(t, State.DONE)}, console)
        shown = states

    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda states: live.update(_table_or_count(states), refresh=True)
    else:
        yield print_changes
        console.print(count(shown), highlight=False)


def print_states(states: States, console: Console) -> None:
    """A table in a terminal, elsewhere a line for each training."""
    if console.is_terminal:
        console.print(_table_or_count(states))
    else:
        _print_lines(states, console)
        console.print(count(states), highlight=False)


def _table_or_count(states: States) -> Table | str:
    return make_table(states) if len({t.model for t in states}) <= ROWS else count(states)


def _print_lines(states: States, console: Console) -> None:
    for training, state in states.items():
        tell(f"{training.name}: {describe(training, state)}", console)


def tell(text: str, console: Console) -> None:
    """Print a line as it is, whatever a path or somebody else's log contains."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_obstacles(
    states: States, waiting: Mapping[Training, str], console: Console, schedulers: Collection[str] = ()
) -> None:
    """Why trainings are not done: ends of logs, who else works on them, lost jobs, and what some wait for.

    Only the given schedulers were asked for their queues.
    """
    for training, state in states.items():
        for line in _explain(training, state, schedulers):
            tell(line, console)
    for training, obstacle in waiting.items():
        tell(f"{training.name} waits for {obstacle}.", console)


def _explain(training: Training, state: State, schedulers: Collection[str]) -> list[str]:
    note = {} if state is State.DONE else training.read_note()
    if state is State.FAILED:
        killed = note.get("exit") in (-signal.SIGKILL, 128 + signal.SIGKILL)
        why = [f"{training.name} was killed; its machine may have too little memory."] if killed else []
        lines = [f"    {line}" for line in read_log(training.log)]
        return [*why, f"{training.name} failed; the end of {training.log}:", *lines[-LAST_LINES:]]
    if state is State.RUNNING:
        # without a lock there is only a young log, and the last owner of the lock may be long gone
        folder = training.folder.path
        who = describe_owner(folder) if is_locked(folder) else "by hand, it seems, as its log is young"
        return [f"{training.name} is in use: {who}."]
    if "job" in note and state in (State.INTERRUPTED, State.MISSING):
        after = f", or job {note['after']}, which had to prepare the dataset" if "after" in note else ""
        scheduler = str(note.get("scheduler", "slurm"))  # whose notes don't name it
        if scheduler not in schedulers:
            return [
                f"{training.name}: {scheduler.upper()} has or had it as job {note['job']}; it is asked only with "
                f"--{scheduler}, or where the file has {scheduler}."
            ]
        return [
            f"{training.name}: its job {note['job']} has left {scheduler.upper()}'s queue before the end; what it "
            f"wrote{after}: {training.out / scheduler}"
        ]
    return []
