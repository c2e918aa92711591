"""Data-scarce folds in nnU-Net's splits_final.json: few of a fold's training cases, all of its validation cases."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from nnunet_lomix.errors import LoMixError, UsageError
from nnunet_lomix.nnunet.datasets import (
    SPLITS,
    Split,
    default_splits,
    read_splits,
    require_preprocessed,
    write_splits,
)

MOST_SEEDS = 1000


def add_scarce_folds(
    dataset: str,
    train_cases: int | None = None,
    train_fraction: float | None = None,
    seeds: int = 3,
    base: int = 0,
) -> None:
    """Append a fold for each seed to the dataset's ``splits_final.json``, unless it is there, and print all folds.

    A file that is there is kept as a numbered backup; if there is none, nnU-Net's own split comes first.

    Args:
        dataset: id or name.
        train_cases, train_fraction: number of training cases, or fraction of those of the base fold; one of the two.
        seeds: how many subsets are drawn: seeds 0, 1, …
        base: the fold whose training cases are drawn from, and whose validation cases are kept.

    Raises:
        LoMixError: the dataset isn't there or preprocessed, or the file isn't nnU-Net's.
        UsageError: an argument doesn't fit.
    """
    if (train_cases is None) == (train_fraction is None):
        raise UsageError("Give either --train-cases or --train-fraction.")
    if seeds > MOST_SEEDS:
        raise UsageError(f"--seeds {seeds} would add more folds than anyone can train: {MOST_SEEDS} at most.")
    if train_fraction is not None and not 0 < train_fraction < 1:
        raise UsageError(f"--train-fraction {train_fraction} is not between 0 and 1.")
    folder = require_preprocessed(dataset)
    file = folder / SPLITS
    old = read_splits(folder) if file.exists() else default_splits(folder)
    if not 0 <= base < len(old):
        raise UsageError(f"There is no fold {base}: the split has {len(old)} folds, counted from 0.")
    count = _count_cases(train_cases, train_fraction, len(old[base]["train"]), base)
    splits, drawn = append_scarce(old, base, count, seeds)
    backup = None
    if not file.exists() or splits != old:
        try:
            backup = back_up(file)
            write_splits(folder, splits)
        except OSError as error:
            raise LoMixError(f"{folder} can't be written: {error.strerror}.") from None
    _report(file, splits, len(old), drawn, base, backup)


def _count_cases(train_cases: int | None, train_fraction: float | None, available: int, base: int) -> int:
    """How many of the available training cases of the base fold are drawn; one of the first two is given."""
    given = ""
    if train_fraction is not None:
        given = f" ({train_fraction:g} of them, rounded)"
        train_cases = int(train_fraction * available + 0.5)
    if train_cases is None or not 1 <= train_cases < available:
        raise UsageError(
            f"{train_cases} training cases{given} can't be drawn from the {available} of fold {base}: 1 to "
            f"{available - 1} can."
        )
    return train_cases


def draw(cases: Sequence[str], count: int, seed: int) -> list[str]:
    """A random subset, sorted; with one seed a smaller one is part of a larger one.

    The order of the cases doesn't matter, nor a version of some random generator: they are ranked by a hash.
    """

    def rank(case: str) -> bytes:
        # a name may be anything that JSON can write, half a character of UTF-16, too
        return sha256(f"{seed} {case}".encode(errors="surrogatepass")).digest()

    return sorted(sorted(cases, key=rank)[:count])


def append_scarce(
    splits: Sequence[Split], base: int, count: int, seeds: int
) -> tuple[list[Split], dict[int, list[int]]]:
    """The folds with those of the seeds behind them, none twice; and for each fold that was drawn its seeds."""
    result = list(splits)
    known: dict[tuple[frozenset[str], frozenset[str]], int] = {}
    for number, fold in enumerate(splits):
        known.setdefault(_content(fold), number)
    drawn: dict[int, list[int]] = {}
    for seed in range(seeds):
        new = Split(train=draw(splits[base]["train"], count, seed), val=splits[base]["val"])
        number = known.setdefault(_content(new), len(result))
        if number == len(result):
            result.append(new)
        drawn.setdefault(number, []).append(seed)
    return result, drawn


def back_up(file: Path) -> Path | None:
    """Copy the file to the first free name beside it; None if there is no file."""
    if not file.exists():
        return None
    number = 1
    while True:
        backup = file.with_name(f"{file.stem}_backup_{number}{file.suffix}")
        try:
            with backup.open("xb") as copy:  # fails where one is
                copy.write(file.read_bytes())
            return backup
        except FileExistsError:
            number += 1


def _content(fold: Split) -> tuple[frozenset[str], frozenset[str]]:
    """Training and validation cases of a fold, by which two folds are the same, whatever the order of the cases."""
    return frozenset(fold["train"]), frozenset(fold["val"])


def _report(
    file: Path,
    splits: Sequence[Split],
    old: int,
    drawn: Mapping[int, Sequence[int]],
    base: int,
    backup: Path | None,
) -> None:
    """Print all folds; the first ``old`` of them were in the file before."""
    meanings = [_describe(fold, splits[:number]) for number, fold in enumerate(splits)]
    for number, seeds in drawn.items():
        was = "new" if number >= old else "was there"
        meanings[number] = f"{was}: drawn from fold {base} with seed {', '.join(map(str, seeds))}"
    console = Console()
    console.print(tabulate_folds(splits, meanings))
    if any(len(seeds) > 1 for seeds in drawn.values()):
        console.print("Seeds that drew the same cases share a fold.")
    if len(splits) > old:
        before = f"; as it was before: {backup.name}" if backup else ""
        console.print(f"Written to {file}{before}", soft_wrap=True, markup=False)
    else:
        console.print(f"Nothing to add: {file} has these folds.", soft_wrap=True, markup=False)
    console.print(f"Train one with: nnUNetv2_train DATASET CONFIGURATION {min(drawn)} -tr TRAINER")


def tabulate_folds(splits: Sequence[Split], meanings: Sequence[str]) -> Table:
    """For the terminal: each fold with its numbers of cases, and what it is."""
    table = Table("fold", "training", "validation", "what it is", box=box.SIMPLE_HEAD, show_edge=False)
    for number, (fold, meaning) in enumerate(zip(splits, meanings, strict=True)):
        table.add_row(str(number), str(len(fold["train"])), str(len(fold["val"])), meaning)
    return table


def is_part(fold: Split, other: Split) -> bool:
    """Whether a fold has some of another one's training cases and all of its validation cases."""
    (train, val), (other_train, other_val) = _content(fold), _content(other)
    return train < other_train and val == other_val


def _describe(fold: Split, earlier: Sequence[Split]) -> str:
    """What the cases alone tell: part of an earlier fold, or a fold of its own."""
    for number, other in enumerate(earlier):
        if is_part(fold, other):
            return f"{len(fold['train'])} of the {len(other['train'])} training cases of fold {number}"
    return "a fold of its own"
