"""Data-scarce folds in nnU-Net's splits_final.json: few of a fold's training cases, all of its validation cases."""

import json
from hashlib import sha256
from pathlib import Path

import click
import numpy as np
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from rich import box
from rich.console import Console
from rich.table import Table

from nnunet_lomix.files import replacing

FILE = "splits_final.json"


def add_scarce_folds(
    dataset: str,
    train_cases: int | None = None,
    train_fraction: float | None = None,
    seeds: int = 3,
    base: int = 0,
    console: Console | None = None,
):
    """Append a fold for each seed to the dataset's ``splits_final.json``, unless it is there, and print all folds.

    A file that is there is kept as a numbered backup; if there is none, nnU-Net's own split comes first.

    Args:
        dataset: id or name.
        train_cases, train_fraction: number of training cases, or fraction of those of the base fold; one of the two.
        seeds: how many subsets are drawn: seeds 0, 1, …
        base: the fold whose training cases are drawn from, and whose validation cases are kept.
        console: where the table is printed.

    Raises:
        click.ClickException: the dataset isn't there or preprocessed, or the file isn't nnU-Net's.
        click.UsageError: an argument doesn't fit.
    """
    if (train_cases is None) == (train_fraction is None):
        raise click.UsageError("Give either --train-cases or --train-fraction.")
    if train_fraction is not None and not 0 < train_fraction < 1:
        raise click.UsageError(f"--train-fraction {train_fraction} is not between 0 and 1.")
    folder = find_dataset(dataset)
    file = folder / FILE
    old = read_splits(file) if file.exists() else default_splits(folder)
    if not 0 <= base < len(old):
        raise click.UsageError(f"There is no fold {base}: the split has {len(old)} folds, counted from 0.")
    available = len(old[base]["train"])
    count = train_cases if train_fraction is None else int(train_fraction * available + 0.5)
    if not 1 <= count < available:
        fraction = "" if train_fraction is None else f" ({train_fraction:g} of them)"
        raise click.UsageError(
            f"{count} training cases{fraction} can't be drawn from the {available} of fold {base}: 1 to "
            f"{available - 1} can."
        )
    splits, drawn = append_scarce(old, base, count, seeds)
    backup = None
    if not file.exists() or splits != old:
        try:
            backup = back_up(file)
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(splits, indent=4))
        except OSError as error:
            raise click.ClickException(f"{folder} can't be written: {error.strerror}.") from None
    _report(console or Console(), file, splits, len(old), drawn, base, backup)


def find_dataset(dataset: str) -> Path:
    """The folder of a dataset, by id or name, in ``nnUNet_preprocessed``.

    Raises:
        click.ClickException: the variable is not set, or there is no such folder.
    """
    variable = nnUNet_preprocessed.env_var_name
    if not nnUNet_preprocessed.is_set():
        raise click.ClickException(
            f"The environment variable {variable} is not set: export {variable}=/your/folder first."
        )
    name = name_dataset(dataset, f"-d and {variable}")
    folder = Path(nnUNet_preprocessed, name)
    if not folder.is_dir():
        raise click.ClickException(
            f"{name} is not in {variable} ({nnUNet_preprocessed}): run nnUNetv2_plan_and_preprocess for it first."
        )
    return folder


def name_dataset(dataset: str, check: str) -> str:
    """The name of a dataset, by id or name.

    Raises:
        click.ClickException: there is none, or there are several; ``check`` says where to look.
    """
    try:
        return maybe_convert_to_dataset_name(dataset)
    except ValueError:
        raise click.ClickException(f"{dataset!r} is neither the number nor the name of a dataset.") from None
    except RuntimeError as error:  # its first sentence says which
        raise click.ClickException(f"{str(error).split('. ')[0]}: check {check}.") from None


def read_splits(file: Path) -> list[dict]:
    """The folds of a ``splits_final.json``.

    Raises:
        click.ClickException: it isn't one.
    """
    try:
        splits = json.loads(file.read_text())
        for cases in (fold[part] for fold in splits for part in ("train", "val")):
            if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
                raise TypeError
    except OSError as error:
        raise click.ClickException(f"{file} can't be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise click.ClickException(
            f"{file} is not a list of folds, each with train and val: mend or remove it."
        ) from None
    return splits


def default_splits(folder: Path) -> list[dict]:
    """What nnU-Net itself would write when a training finds no ``splits_final.json``.

    Args:
        folder: of the dataset in ``nnUNet_preprocessed``.

    Raises:
        click.ClickException: nothing is preprocessed, configurations have different cases, or there are less than 5.
    """
    # each case has one file with its properties in the folder of each configuration
    configurations = sorted({file.parent for file in folder.glob("*/*.pkl")})
    if not configurations:
        raise click.ClickException(f"{folder} has no preprocessed cases: run nnUNetv2_preprocess first.")
    found = {c.name: set(infer_dataset_class(str(c)).get_identifiers(str(c))) for c in configurations}
    cases, *others = found.values()
    if any(other != cases for other in others):
        counts = ", ".join(f"{name} {len(cases)}" for name, cases in found.items())
        raise click.ClickException(f"{folder} has different cases by configuration ({counts}): preprocess again.")
    if len(cases) < 5:
        raise click.ClickException(f"{folder} has {len(cases)} cases: nnU-Net's split into 5 folds needs 5.")
    splits = generate_crossval_split(list(np.sort(list(cases))), seed=12345, n_splits=5)
    # strings of numpy become Python's
    return [{part: [str(case) for case in fold[part]] for part in ("train", "val")} for fold in splits]


def draw(cases: list[str], count: int, seed: int) -> list[str]:
    """A random subset, sorted; with one seed a smaller one is part of a larger one.

    The order of the cases doesn't matter, nor a version of some random generator: they are ranked by a hash.
    """
    return sorted(sorted(cases, key=lambda case: sha256(f"{seed} {case}".encode()).digest())[:count])


def append_scarce(splits: list[dict], base: int, count: int, seeds: int) -> tuple[list[dict], dict[int, list[int]]]:
    """The folds with those of the seeds behind them, none twice; and for each fold that was drawn its seeds."""
    result, drawn = list(splits), {}
    for seed in range(seeds):
        new = {"train": draw(splits[base]["train"], count, seed), "val": splits[base]["val"]}
        known = [_content(fold) for fold in result]
        if _content(new) not in known:
            result.append(new)
            known.append(_content(new))
        drawn.setdefault(known.index(_content(new)), []).append(seed)
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


def _content(fold: dict) -> tuple[frozenset, frozenset]:
    return frozenset(fold["train"]), frozenset(fold["val"])


def _report(console: Console, file: Path, splits: list, old: int, drawn: dict, base: int, backup: Path | None):
    table = Table("fold", "training", "validation", "what it is", box=box.SIMPLE_HEAD, show_edge=False)
    for number, fold in enumerate(splits):
        if number in drawn:
            seeds = ", ".join(map(str, drawn[number]))
            what = f"{'new' if number >= old else 'was there'}: drawn from fold {base} with seed {seeds}"
        else:
            what = _describe(fold, splits[:number])
        table.add_row(str(number), str(len(fold["train"])), str(len(fold["val"])), what)
    console.print(table)
    if any(len(seeds) > 1 for seeds in drawn.values()):
        console.print("Seeds that drew the same cases share a fold.")
    if len(splits) > old:
        console.print(
            f"Written to {file}" + (f"; as it was before: {backup.name}" if backup else ""),
            soft_wrap=True,
            markup=False,
        )
    else:
        console.print(f"Nothing to add: {file} has these folds.", soft_wrap=True, markup=False)
    console.print(f"Train one with: nnUNetv2_train DATASET CONFIGURATION {min(drawn)} -tr TRAINER")


def _describe(fold: dict, earlier: list[dict]) -> str:
    """What the cases alone tell: part of an earlier fold, or a fold of its own."""
    train, val = _content(fold)
    for number, other in enumerate(earlier):
        if val == frozenset(other["val"]) and train < frozenset(other["train"]):
            return f"{len(train)} of the {len(other['train'])} training cases of fold {number}"
    return "a fold of its own"
