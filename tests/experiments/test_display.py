"""What is shown of states in a terminal and elsewhere."""

import io

from rich.console import Console

from nnunet_lomix.experiments.display import print_states, showing
from nnunet_lomix.experiments.training import State, Training


def trainings(tmp_path, trainers: int) -> list[Training]:
    models = [f"Trainer{i}" for i in range(trainers)]
    return [
        Training("Dataset001_A", "2d", "Plans", model, fold, tmp_path, tmp_path) for model in models for fold in "01"
    ]


def show(terminal: bool, *states: dict[Training, State]) -> str:
    """What is printed of states, one after the other; the last of them once more by the command status."""
    console = Console(width=100, file=io.StringIO(), force_terminal=terminal, color_system=None)
    with showing(console) as show_states:
        for each in states:
            show_states(each)
    print_states(states[-1], console)
    return console.file.getvalue()


def test_a_terminal_has_a_table_that_changes(tmp_path):
    one, two = trainings(tmp_path, 1)
    output = show(True, {one: State.RUNNING, two: State.MISSING}, {one: State.DONE, two: State.FAILED})
    assert "Dataset001_A 2d Plans" in output and "fold 1" in output and "Trainer0" in output
    assert "1 running, 1 missing" in output and output.rstrip().endswith("1 done, 1 failed")


def test_of_many_models_a_terminal_has_the_counts(tmp_path):
    output = show(True, dict.fromkeys(trainings(tmp_path, 41), State.DONE))
    assert "82 done" in output and "fold" not in output


def test_elsewhere_there_is_a_line_for_each_change(tmp_path):
    one, two = trainings(tmp_path, 1)
    same = {one: State.DONE, two: State.QUEUED}
    changes = show(False, same, same, {one: State.DONE, two: State.DONE}).splitlines()
    name = "Dataset001_A/Trainer0__Plans__2d/fold"
    assert changes == [f"{name}_1: queued", f"{name}_1: done", "2 done", f"{name}_0: done", f"{name}_1: done", "2 done"]
