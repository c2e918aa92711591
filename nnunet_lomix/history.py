"""What the weights did during a training: a table and a picture beside nnU-Net's progress.png."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from nnunet_lomix.files import replacing
from nnunet_lomix.maps import Map

TABLE = "lomix_weights.csv"
PICTURE = "lomix_weights.png"


def write_history(history: Sequence[dict[str, float]], folder: str | Path):
    """Write ``lomix_weights.csv``: a row for each epoch, a column for each map.

    Args:
        history: for each epoch the effective weight of each map by name; empty for epochs without LoMix.
        folder: an existing folder.
    """
    with replacing(Path(folder, TABLE)) as temporary:
        pd.DataFrame(history).to_csv(temporary, index_label="epoch", float_format="%.6g")


def plot_history(history: Sequence[dict[str, float]], maps: Sequence[Map], folder: str | Path):
    """Draw ``lomix_weights.png``: the last weights as a heat map of operator × subset, and all weights over epochs.

    They are drawn relative to the sum of the first epoch that has weights.

    Args:
        history: as for :func:`write_history`; the last epoch must not be empty.
        maps: the maps, in any order.
        folder: an existing folder.
    """
    total = sum(next(filter(None, history)).values())  # 1, but for the paper's weights; that they fade stays visible
    history = [{name: w / total for name, w in epoch.items()} for epoch in history]
    # nnU-Net's own plots change matplotlib's global settings
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        subsets = list(dict.fromkeys(m.subset for m in maps))
        figure = Figure(figsize=(max(8, 3 + 0.62 * len(subsets)), 8), layout="constrained")
        now, over_time = figure.subplots(2, 1)
        top = _draw_heat_map(now, history[-1], maps, subsets)
        beyond = " (z_0 is beyond the colour scale)" if 100 * history[-1]["z_0"] > top else ""
        now.set_title(f"Weight of each map after epoch {len(history) - 1}, in %{beyond}", loc="left")
        draw_evolution(over_time, history, maps)
        over_time.set_title("Weight of each map over the training, in %", loc="left")
        with replacing(Path(folder, PICTURE)) as temporary:
            figure.savefig(temporary, format="png", dpi=110)


def _draw_heat_map(ax: Axes, weights: dict[str, float], maps: Sequence[Map], subsets: Sequence[str]) -> float:
    """Gives the end of the colour scale, in %."""
    operators = list(dict.fromkeys(m.operator for m in maps))
    table = np.full((len(operators), len(subsets)), np.nan)
    for m in maps:
        table[operators.index(m.operator), subsets.index(m.subset)] = 100 * weights[m.name]
    # z_0 has most of the loss: the colours are for the others
    top = max(100 * w for name, w in weights.items() if name != "z_0")
    ax.imshow(table, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            colour = "white" if value < 0.6 * top else "black"
            ax.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=9)
    ax.set_yticks(range(len(operators)), operators)
    ax.set_xticks(range(len(subsets)), subsets, rotation=0 if len(subsets) < 12 else 45)
    ax.set_xlabel("scales, 0 is the finest")
    return top


def draw_evolution(ax: Axes, history: Sequence[dict[str, float]], maps: Sequence[Map]):
    """Draw the weight of each map over epochs, in %, on a logarithmic axis; arguments as for :func:`plot_history`."""
    operators = list(dict.fromkeys(m.operator for m in maps))
    colours = dict(zip(operators, matplotlib.colormaps["tab10"].colors, strict=False))
    single = sum(map(bool, history)) == 1  # a line needs two points
    for m in maps:
        values = [100 * epoch.get(m.name, np.nan) for epoch in history]
        style = dict(lw=2.5) if m.name == "z_0" else dict(lw=1, alpha=0.7)
        ax.plot(values, color=colours[m.operator], marker="o" if single else None, **style)
    others = {name: w for name, w in history[-1].items() if name != "z_0"}
    for name in ("z_0", max(others, key=others.get)):
        end = (len(history) - 1, 100 * history[-1][name])
        style = dict(xytext=(6, 0), textcoords="offset points", va="center", fontsize=9, annotation_clip=False)
        ax.annotate(name, end, **style)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.margins(x=0.12)  # room for the names
    ax.set_xlabel("epoch")
    lines = [matplotlib.lines.Line2D([], [], color=c) for c in colours.values()]
    ax.legend(lines, colours, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=len(colours), frameon=False)
