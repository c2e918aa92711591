"""What is drawn of the weights, each on axes of a figure; and the picture of several folds."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from nnunet_lomix.files import replacing
from nnunet_lomix.loss.maps import ORIGINAL, Map
from nnunet_lomix.weights.summary import (
    by_operator,
    by_scale,
    folds_differ,
    last_weights,
    relative_weights,
    share_of_each,
    shares,
)

MARKERS = "os^Dv"  # of the folds


def plot_folds(histories: Mapping[str, pd.DataFrame], maps: Sequence[Map], file: Path) -> None:
    """Draw all maps as a heat map, scales, operators, the folds side by side, and the weights over epochs.

    Args:
        histories: as from :func:`~nnunet_lomix.weights.read.read_history`, by name of the fold.
        maps: those of all folds.
        file: where the picture is written.
    """
    last = last_weights(histories)
    relative = relative_weights(last)
    width = max(9, 3 + 0.7 * len({m.subset for m in maps}), 2 + 0.3 * len(maps))
    with drawing(file, width, 15) as figure:
        axes = figure.subplot_mosaic("HH;SO;FF;EE", height_ratios=(4, 3, 4, 4.5))
        _draw_differences(axes["H"], relative.mean(axis=1), last.loc["z_0"].mean(), maps)
        _draw_shares(axes["S"], shares(last, by_scale(maps)), "scale, 0 is the finest")
        _draw_shares(axes["O"], shares(last, by_operator(maps)), "operator")
        _draw_each_fold(axes["F"], relative)
        epochs = pd.concat([share_of_each(history) for history in histories.values()], keys=histories)
        draw_evolution(axes["E"], epochs.groupby(level=1).mean().to_dict("records"), maps)
        axes["E"].set_title("Share of each map over the training, in %, mean of the folds that got as far", loc="left")


@contextmanager
def drawing(file: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure, in inches, that is written as PNG at the end of the block, whole or not at all."""
    # nnU-Net's own plots change matplotlib's global settings
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replacing(file) as temporary:
            figure.savefig(temporary, format="png", dpi=110)


def draw_heat_map(
    ax: Axes, values: Mapping[str, float], maps: Sequence[Map], norm: Normalize, colours: str, form: str
) -> None:
    """Draw a value of each map, operators below each other, subsets of the scales beside each other.

    Args:
        ax: where.
        values: by name of the map; those that are missing stay empty.
        maps: in any order.
        norm: takes the values to the range of the colours.
        colours: name of a colour map of matplotlib.
        form: how a value is written, ``".1f"``.
    """
    operators, subsets = _list_rows_and_columns(maps)
    table = np.full((len(operators), len(subsets)), np.nan)
    for m in maps:
        table[operators.index(m.operator), subsets.index(m.subset)] = values.get(m.name, np.nan)
    image = ax.imshow(table, cmap=colours, norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(norm(value))
            luminance = 0.299 * red + 0.587 * green + 0.114 * blue
            colour = "black" if luminance > 0.5 else "white"
            ax.text(column, row, f"{value:{form}}", ha="center", va="center", color=colour, fontsize=9)
    ax.set_yticks(range(len(operators)), operators)
    ax.set_xticks(range(len(subsets)), subsets, rotation=0 if len(subsets) < 12 else 45)
    ax.set_xlabel("scales, 0 is the finest")


def _list_rows_and_columns(maps: Sequence[Map]) -> tuple[list[str], list[str]]:
    """The operators and the subsets of scales, in the order of the heat map."""
    return list(dict.fromkeys(m.operator for m in maps)), list(dict.fromkeys(m.subset for m in maps))


def draw_evolution(ax: Axes, history: Sequence[Mapping[str, float]], maps: Sequence[Map]) -> None:
    """Draw the weight of each map over epochs, in %, on a logarithmic axis.

    Args:
        ax: where.
        history: for each epoch the weight of each map by name, as a share; the last epoch must have all.
        maps: in any order.
    """
    operators = list(dict.fromkeys(m.operator for m in maps))
    colours = dict(zip(operators, cycle(matplotlib.color_sequences["tab10"]), strict=False))
    is_point = sum(map(bool, history)) == 1  # a line needs two epochs with weights
    for m in maps:
        ax.plot(
            [100 * epoch.get(m.name, np.nan) for epoch in history],
            color=colours[m.operator],
            marker="o" if is_point else None,
            linewidth=2.5 if m.name == "z_0" else 1,
            alpha=1 if m.name == "z_0" else 0.7,
        )
    last = history[-1]
    for name in ("z_0", max(last.keys() - {"z_0"}, key=last.__getitem__)):
        ax.annotate(
            name,
            (len(history) - 1, 100 * last[name]),
            xytext=(6, 0),
            textcoords="offset points",
            verticalalignment="center",
            annotation_clip=False,
            fontsize=9,
        )
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.margins(x=0.12)  # room for the names
    ax.set_xlabel("epoch")
    lines = [Line2D([], [], color=colour) for colour in colours.values()]
    ax.legend(lines, operators, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=len(lines), frameon=False)


def _draw_differences(ax: Axes, relative: pd.Series, first: float, maps: Sequence[Map]) -> None:
    """The heat map of what LoMix changed; z_0 isn't weighed against the others and has its share instead."""
    differences = 100 * (relative - 1)
    top = max(25, differences.abs().max())  # small differences stay pale
    draw_heat_map(ax, differences.to_dict(), maps, TwoSlopeNorm(0, -top, top), "RdBu_r", "+.0f")
    ax.set_facecolor("#e4e4e4")  # where there is no map; white is an equal weight
    operators, subsets = _list_rows_and_columns(maps)
    ax.text(
        subsets.index("0"),
        operators.index(ORIGINAL),
        f"{100 * first:.0f} %\nof all",
        ha="center",
        va="center",
        color="#555555",
        fontsize=8,
    )
    ax.set_title("Weight of each map against equal weights, in %, mean over folds (z_0: its share)", loc="left")


def _draw_shares(ax: Axes, part: pd.DataFrame, kind: str) -> None:
    part = 100 * part
    positions = np.arange(len(part))
    several = folds_differ(part)
    error = [part["mean"] - part["low"], part["high"] - part["mean"]] if several else None
    ax.bar(positions, part["mean"], yerr=error, capsize=4, color="#7fa8d1", ecolor="#33475b", width=0.6)
    ax.hlines(part["equal"], positions - 0.4, positions + 0.4, color="black", lw=1.5, ls="--", label="equal weights")
    ax.set_xticks(positions, part.index)
    ax.set_ylim(0, 1.25 * max(part["high"].max(), part["equal"].max()))
    ax.set_xlabel(kind)
    ax.legend(loc="upper right", frameon=False)
    ax.set_title("Share without z_0, in %" + (" (thin lines: range over folds)" if several else ""), loc="left")


def _draw_each_fold(ax: Axes, relative: pd.DataFrame) -> None:
    order = relative.mean(axis=1).sort_values(ascending=False).index
    for fold, marker in zip(relative, cycle(MARKERS), strict=False):
        ax.plot(range(len(order)), relative.loc[order, fold], marker, ms=5, alpha=0.7, label=fold)
    ax.plot(range(len(order)), relative.loc[order].mean(axis=1), color="black", lw=1, label="mean")
    ax.axhline(1, color="black", lw=1, ls="--", label="equal weights")
    ax.set_xticks(range(len(order)), order, rotation=90)
    ax.set_ylim(bottom=0)
    ax.margins(x=0.02)
    ax.legend(loc="lower left", frameon=False, fontsize=8, ncols=2)  # sorted: nothing is below the heaviest
    ax.set_title("Each fold: weight as a multiple of equal weights", loc="left")
