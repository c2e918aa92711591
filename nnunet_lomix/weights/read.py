"""The weights of a training, from the table that a trainer writes, or else from a checkpoint."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.loss.maps import ORIGINAL, Map
from nnunet_lomix.nnunet.checkpoints import STATE, read_checkpoint
from nnunet_lomix.nnunet.results import FoldFolder, list_folds
from nnunet_lomix.weights.history import TABLE


def find_folds(folders: Sequence[str | Path]) -> dict[str, FoldFolder]:
    """The fold folders, by names as short as they can be.

    Raises:
        LoMixError: a folder is neither a trainer's nor a fold's.
    """
    found: list[FoldFolder] = []
    for folder in folders:
        own = list_folds(Path(folder).resolve())
        if not own:
            raise LoMixError(f"{folder} has no fold_X in it: name the folder of a trainer, or of a fold.")
        found += own
    found = list(dict.fromkeys(found))
    paths = [fold.path for fold in found]
    choices = (
        [path.name for path in paths],
        [f"{path.parent.name.split('__')[0]}/{path.name}" for path in paths],
        [f"{path.parent.name}/{path.name}" for path in paths],
        [str(path) for path in paths],
    )
    names = next(names for names in choices if len(set(names)) == len(found))
    return dict(zip(names, found, strict=True))


def has_history(fold: FoldFolder) -> bool:
    """Whether LoMix, or another trainer, has ended an epoch there."""
    return (fold.path / TABLE).is_file() or fold.last_checkpoint() is not None


def read_history(fold: FoldFolder) -> pd.DataFrame:
    """The weights of a fold: a row for each epoch, a column for each map; NaN for epochs without LoMix.

    From ``lomix_weights.csv``, which is written after every epoch, or else from a checkpoint.

    Raises:
        LoMixError: there are none, or the file isn't right.
    """
    table, checkpoint = fold.path / TABLE, fold.last_checkpoint()
    if table.is_file():
        return _require_weights(_read_table(table), table)
    if checkpoint is None:
        raise LoMixError(f"{fold.path} has neither {TABLE} nor a checkpoint: LoMix has not ended an epoch there.")
    state = read_checkpoint(checkpoint).get(STATE)
    if state is None:
        raise LoMixError(f"{checkpoint} has no LoMix state: it was not written by a trainer of nnunet_lomix.")
    return _require_weights(pd.DataFrame(state["history"]), checkpoint)


def _read_table(file: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(file, index_col="epoch")
    except (OSError, ValueError) as error:
        raise LoMixError(f"{file} can't be read: {str(error).splitlines()[0]}.") from None


def _require_weights(history: pd.DataFrame, file: Path) -> pd.DataFrame:
    """The history, if it is one."""
    numeric = all(pd.api.types.is_numeric_dtype(kind) for kind in history.dtypes)
    named = all(parse_map(name) is not None for name in history.columns)
    if not numeric or not named or "z_0" not in history or len(history.columns) < 2:
        raise LoMixError(f"{file} is not a table of LoMix weights, a column for each map, z_0 among them.")
    if not len(history) or not np.isfinite(history.iloc[-1]).all() or (history.iloc[-1] < 0).any():
        raise LoMixError(f"{file} has no weights for its last epoch.")
    if not history.iloc[-1].drop("z_0").sum():
        raise LoMixError(f"In {file} all weight is z_0's: there is nothing to compare.")
    return history


def parse_map(name: str) -> Map | None:
    """The inverse of :attr:`Map.name`; None if no map has this name.

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
