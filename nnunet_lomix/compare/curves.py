"""Learning curves and times of epochs, from nnU-Net's training logs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

COLUMNS = ["trainer", "seed", "fold", "epoch", "pseudo_dice", "seconds"]

_LINE = re.compile(r": (Pseudo dice|Epoch time:|Epoch) (.*)$")
# numpy 2 writes np.float32(0.5)
_NUMBER = re.compile(r"(?<![\w.])(?:nan|\d+\.?\d*(?:e[+-]?\d+)?)")


def read_curves(models: Mapping[tuple[str, int], Path], folds: Sequence[str]) -> pd.DataFrame:
    """A row for each epoch of each training that has a log.

    Args:
        models: results folder of each trainer and seed.
        folds: which.

    Returns:
        Columns ``trainer``, ``seed``, ``fold``, ``epoch``, ``pseudo_dice`` (0 to 1, mean over classes as nnU-Net's; NaN
        if it is undefined) and ``seconds``.
    """
    rows = [
        (trainer, seed, fold, epoch, *values)
        for (trainer, seed), folder in models.items()
        for fold in folds
        for epoch, values in _read_logs(folder / f"fold_{fold}").items()
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _read_logs(folder: Path) -> dict[int, tuple[float, float]]:
    """Pseudo Dice and seconds of each finished epoch; what was repeated after an interruption counts."""
    epochs = {}
    epoch, dice = None, float("nan")
    # names end in date and time, not padded
    for file in sorted(folder.glob("training_log_*.txt"), key=lambda f: tuple(map(int, re.findall(r"\d+", f.stem)))):
        started = None
        for line in file.read_text(errors="replace").splitlines():
            match = _LINE.search(line.rstrip())
            if match is None:
                continue
            what, value = match.groups()
            if what == "Epoch" and value.isdecimal():
                epoch, dice = int(value), float("nan")
                if started is None:  # what follows was repeated, or belongs to a training before
                    started = epoch
                    epochs = {e: v for e, v in epochs.items() if e < started}
            elif what == "Pseudo dice":
                dice = _average(value)
            elif what == "Epoch time:" and epoch is not None:
                epochs[epoch] = dice, float(value.split()[0])
    return dict(sorted(epochs.items()))


def _average(values: str) -> float:
    """Of the numbers that are not NaN.

    >>> _average("[np.float32(0.5), np.float32(nan), 0.25]")
    0.375
    """
    numbers = np.array([float(n) for n in _NUMBER.findall(values)])
    numbers = numbers[~np.isnan(numbers)]
    return float(numbers.mean()) if len(numbers) else float("nan")
