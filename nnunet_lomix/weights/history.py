"""What the weights did during a training: a table and a picture beside nnU-Net's progress.png."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.colors import Normalize

from nnunet_lomix.files import replacing
from nnunet_lomix.loss.maps import Map
from nnunet_lomix.weights.pictures import draw_evolution, draw_heat_map, draw_legend, drawing, finish_evolution

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
    """Draw ``lomix_weights.png``: the last weights as a heat map of operator × subset, and all weights over epochs.

    They are drawn relative to the sum of the first epoch that has weights.

    Args:
        history: as for :func:`write_history`; the last epoch must not be empty.
        maps: the maps, in any order.
        folder: an existing folder.
    """
    total = sum(next(filter(None, history)).values())  # 1, but for the paper's weights; that they fade stays visible
    shares = [{name: weight / total for name, weight in epoch.items()} for epoch in history]
    last = {name: 100 * share for name, share in shares[-1].items()}
    width = max(8, 4 + 0.62 * len({m.subset for m in maps}))
    with drawing(Path(folder, PICTURE), width, 8) as figure:
        now, evolution = figure.subplots(2, 1)
        draw_heat_map(now, last, maps, Normalize(0, max(last.values())), "viridis", ".1f")
        now.set_title(f"Weight of each map after epoch {len(history) - 1}, in %", loc="left")
        draw_evolution(evolution, shares, maps)
        finish_evolution(evolution, shares, maps)
        draw_legend(figure, maps)
        evolution.set_title("Weight of each map over the training, in %", loc="left")
