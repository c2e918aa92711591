"""The weights of a training, epoch by epoch: the table and the picture beside nnU-Net's progress.png."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_lomix.errors import LoMixError, describe
from nnunet_lomix.files import replacing
from nnunet_lomix.loss.maps import ORIGINAL, Map
from nnunet_lomix.nnunet.checkpoints import STATE, read_checkpoint
from nnunet_lomix.nnunet.results import FoldFolder
from nnunet_lomix.weights.picture import draw_weights
from nnunet_lomix.weights.summary import Group

TABLE = "lomix_weights.csv"
PICTURE = "lomix_weights.png"


def write_history(history: Sequence[Mapping[str, float]], folder: str | Path) -> None:
    """Write ``lomix_weights.csv``: a row for each epoch, a column for each map.

    Args:
        history: for each epoch the weight of each map by name; empty for epochs without LoMix.
        folder: an existing folder.
    """
    with replacing(Path(folder, TABLE)) as temporary:
        pd.DataFrame(history).to_csv(temporary, index_label="epoch", float_format="%.6g")


def plot_history(history: Sequence[Mapping[str, float]], maps: Sequence[Map], folder: str | Path) -> None:
    """Draw ``lomix_weights.png``; ``history`` and ``folder`` as for :func:`write_history`.

    Args:
        maps: the maps, in any order. The last epoch must have weights for all of them.
    """
    draw_weights([Group("", {"": pd.DataFrame(history)}, maps)], Path(folder, PICTURE))


def read_history(fold: FoldFolder) -> pd.DataFrame | None:
    """The weights of a fold: a row for each epoch, a column for each map; NaN for epochs without LoMix.

    From ``lomix_weights.csv``, which is written after every epoch, or else from a checkpoint. None if LoMix has not
    ended an epoch there.

    Raises:
        LoMixError: the checkpoint is another trainer's, or the file isn't right.
    """
    table = fold.path / TABLE
    if table.is_file():
        remedy = "remove it, and the weights in the checkpoint are shown"
        try:
            history = pd.read_csv(table, index_col="epoch")
        except Exception as error:  # pandas raises many kinds
            raise LoMixError(f"{table} can't be read: {describe(error).rstrip('.')}; {remedy}.") from None
        return _require_weights(history, table, remedy)
    checkpoint = fold.last_checkpoint()
    if checkpoint is None:
        return None
    state = read_checkpoint(checkpoint).get(STATE)
    if state is None:
        raise LoMixError(f"{checkpoint} has no LoMix state: it was not written by a trainer of nnunet_lomix.")
    if not any(state["history"]):  # a finished checkpoint of another trainer, which LoMix's has saved again
        return None
    return _require_weights(pd.DataFrame(state["history"]), checkpoint, "name another folder")


def _require_weights(history: pd.DataFrame, file: Path, remedy: str) -> pd.DataFrame:
    """The history again; a :class:`LoMixError`, which ends with the remedy, if it isn't one that can be shown."""
    numeric = all(pd.api.types.is_numeric_dtype(kind) for kind in history.dtypes)
    named = all(parse_map(name) is not None for name in history.columns)
    if not numeric or not named or "z_0" not in history or len(history.columns) < 2:
        raise LoMixError(f"{file} is not a table of LoMix weights, a column for each map, z_0 among them: {remedy}.")
    last = history[-1:].to_numpy()
    if not np.isfinite(last).all() or (last < 0).any() or not last.any():
        raise LoMixError(f"{file} has no weights for its last epoch: {remedy}.")
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
