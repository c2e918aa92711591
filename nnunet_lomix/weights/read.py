"""The weights of a training, from the table that a trainer writes, or else from a checkpoint."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_lomix.errors import LoMixError, explaining
from nnunet_lomix.loss.maps import ORIGINAL, Map
from nnunet_lomix.nnunet.checkpoints import STATE, read_checkpoint
from nnunet_lomix.nnunet.datasets import SPLITS, Split, find_root, read_splits, require_utf8
from nnunet_lomix.nnunet.results import FoldFolder, list_folds
from nnunet_lomix.splits import is_part
from nnunet_lomix.weights.history import TABLE


class NoWeights(LoMixError):
    """LoMix has not ended an epoch in this fold."""


def find_groups(folders: Sequence[str | Path]) -> dict[str, dict[str, FoldFolder]]:
    """The fold folders by name, for each group that is shown in a column of its own, by a name as short as it can be.

    The folds of a model folder are a group, and those of them that were trained with few cases are others, one for
    each number of cases.

    Args:
        folders: of models, for all of their folds, or of folds.

    Raises:
        LoMixError: a folder is neither a model's nor a fold's, or ``splits_final.json`` isn't nnU-Net's.
    """
    models: dict[Path, dict[str, FoldFolder]] = {}
    for folder in folders:
        path = Path(folder).resolve()
        require_utf8(path)
        own = list_folds(path)
        if not own:
            raise LoMixError(f"{path} has no fold_X in it: name the folder of a trainer, or of a fold.")
        for fold in own:
            models.setdefault(fold.path.parent, {})[fold.path.name] = fold
    groups: dict[str, dict[str, FoldFolder]] = {}
    for name, (model, folds) in zip(name_models(list(models)), models.items(), strict=True):
        scarce = count_scarce(read_splits_of(model) or [])
        for fold in folds.values():
            cases = f", {scarce[fold.fold]} training cases" if fold.fold in scarce else ""
            groups.setdefault(f"{name}{cases}", {})[fold.path.name] = fold
    return groups


def name_models(models: Sequence[Path]) -> list[str]:
    """Names for model folders that tell them apart: by trainer, by whole name, with the dataset, or by path.

    >>> name_models([Path("/r/D/A__P__2d"), Path("/r/D/B__P__2d")])
    ['A', 'B']
    >>> name_models([Path("/r/seed_0/D/A__P__2d"), Path("/r/seed_1/D/A__P__2d")])
    ['seed_0/D/A__P__2d', 'seed_1/D/A__P__2d']
    """
    above = Path(os.path.commonpath(models)) if len(models) > 1 else Path("/")
    choices = (
        [model.name.split("__")[0] for model in models],
        [model.name for model in models],
        [f"{model.parent.name}/{model.name}" for model in models],
        [model.relative_to(above).as_posix() for model in models],
    )
    return next(names for names in choices if len(set(names)) == len(models))


def read_splits_of(model: Path) -> list[Split] | None:
    """The folds of the dataset of a model folder, if ``nnUNet_preprocessed`` has them.

    Raises:
        LoMixError: ``splits_final.json`` isn't nnU-Net's.
    """
    root = find_root("nnUNet_preprocessed")
    folder = root / model.parent.name if root is not None else None
    return read_splits(folder) if folder is not None and (folder / SPLITS).is_file() else None


def count_scarce(splits: Sequence[Split]) -> dict[str, int]:
    """For each fold with only a part of the training cases of another one, by number, how many it has."""
    return {
        str(number): len(fold["train"])
        for number, fold in enumerate(splits)
        if any(is_part(fold, other) for other in splits)
    }


def warn_of_unknown_splits(groups: Mapping[str, Mapping[str, FoldFolder]]) -> Iterator[str]:
    """A sentence for each group that may have full and scarce folds in it, as nobody knows their cases.

    Args:
        groups: as from :func:`find_groups`.
    """
    for name, folds in groups.items():
        model = next(iter(folds.values())).path.parent
        # nnU-Net's own split has 5 folds; further ones come from a splits_final.json
        added = [fold.path.name for fold in folds.values() if fold.fold.isdecimal() and int(fold.fold) >= 5]
        if len(folds) > len(added) > 0 and read_splits_of(model) is None:
            yield (
                f"{name} is one column, though {', '.join(added)} may have fewer training cases than the other folds: "
                f"set nnUNet_preprocessed, in which {model.parent.name}/{SPLITS} says how many."
            )


def read_history(fold: FoldFolder) -> pd.DataFrame:
    """The weights of a fold: a row for each epoch, a column for each map; NaN for epochs without LoMix.

    From ``lomix_weights.csv``, which is written after every epoch, or else from a checkpoint.

    Raises:
        NoWeights: LoMix has not ended an epoch there.
        LoMixError: the checkpoint is another trainer's, or the file isn't right.
    """
    table, checkpoint = fold.path / TABLE, fold.last_checkpoint()
    if table.is_file():
        return _require_weights(_read_table(table), table)
    if checkpoint is None:
        raise NoWeights(f"{fold.path} has neither {TABLE} nor a checkpoint: LoMix has not ended an epoch there.")
    state = read_checkpoint(checkpoint).get(STATE)
    if state is None:
        raise LoMixError(f"{checkpoint} has no LoMix state: it was not written by a trainer of nnunet_lomix.")
    if not any(state["history"]):  # a finished checkpoint of another trainer, which LoMix's has saved again
        raise NoWeights(f"{checkpoint} has no weights: LoMix has not ended an epoch there.")
    return _require_weights(pd.DataFrame(state["history"]), checkpoint)


def _read_table(file: Path) -> pd.DataFrame:
    with explaining(f"{file} can't be read"):
        return pd.read_csv(file, index_col="epoch")


def _require_weights(history: pd.DataFrame, file: Path) -> pd.DataFrame:
    """Gives the history back, if it is a table of weights that can be shown; ``file`` is where it comes from.

    Raises:
        LoMixError: it isn't.
    """
    numeric = all(pd.api.types.is_numeric_dtype(kind) for kind in history.dtypes)
    named = all(parse_map(name) is not None for name in history.columns)
    if not numeric or not named or "z_0" not in history or len(history.columns) < 2:
        raise LoMixError(f"{file} is not a table of LoMix weights, a column for each map, z_0 among them.")
    last = history[-1:].to_numpy()
    if not np.isfinite(last).all() or (last < 0).any() or not last.any():
        raise LoMixError(f"{file} has no weights for its last epoch.")
    return history


def parse_map(name: str) -> Map | None:
    """The map that has this name, by the rule of :attr:`Map.name`; None if no map can have it.

    >>> parse_map("add_0_2")
    Map(operator='add', scales=(0, 2))
    """
    parts = re.fullmatch(r"([^\W\d]\w*?)((?:_\d+)+)", name)
    if parts is None:
        return None
    scales = tuple(map(int, parts[2][1:].split("_")))
    parsed = Map(ORIGINAL if parts[1] == "z" else parts[1], scales)
    return parsed if parsed.name == name else None


def common_maps(histories: Mapping[str, pd.DataFrame]) -> list[Map]:
    """The maps of all folds.

    Args:
        histories: as from :func:`read_history`, by name of the fold.

    Raises:
        LoMixError: they aren't the same.
    """
    (first, history), *others = histories.items()
    for name, other in others:
        if set(other.columns) != set(history.columns):
            raise LoMixError(f"{first} and {name} have different maps: show them one by one.")
    return [parsed for parsed in map(parse_map, history.columns) if parsed is not None]
