"""What is drawn of the weights, each on axes of a figure; and the picture of several folds and models."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from matplotlib.typing import ColorType
from scipy.optimize import isotonic_regression

from nnunet_lomix.files import replacing
from nnunet_lomix.loss.maps import Map
from nnunet_lomix.weights.summary import (
    Group,
    folds_differ,
    operator_membership,
    relative_weights,
    scale_membership,
    share_of_each,
    shares,
    with_minus,
)

MARKERS = "os^Dv"  # of the folds
LONGEST = 65_000  # pixels along an axis; Matplotlib can't draw more than 2¹⁶
LABEL_DISTANCE = 0.05  # between names of lines, as a part of the height of the axes


def plot_groups(groups: Sequence[Group], file: Path) -> None:
    """Draw a column for each group: all maps as a heat map, scales, operators, its folds, the weights over epochs.

    Axes and colours are the same in all columns.

    Args:
        groups: at least one.
        file: where the picture is written.
    """
    widths = [max(9, 3 + 0.7 * len({m.subset for m in group.maps}), 2 + 0.3 * len(group.maps)) for group in groups]
    differences = [100 * (relative_weights(group.last).mean(axis=1) - 1) for group in groups]
    top = max(25, *(column.abs().max() for column in differences))  # small differences stay pale
    epochs = [_mean_over_folds(group) for group in groups]
    with drawing(file, sum(widths), 16) as figure:
        columns = []
        parts = figure.subfigures(1, len(groups), squeeze=False, width_ratios=widths)[0]
        for part, group, width, difference, history in zip(parts, groups, widths, differences, epochs, strict=True):
            part.suptitle(fill(group.name, int(8 * width)), fontweight="bold")
            axes = part.subplot_mosaic("HH;SO;FF;EE", height_ratios=(4, 3, 4, 4))
            columns.append(axes)
            _draw_differences(axes["H"], difference, top, group.maps)
            _draw_shares(axes["S"], "scale", shares(group.last, scale_membership(group.maps)))
            _draw_shares(axes["O"], "operator", shares(group.last, operator_membership(group.maps)))
            _draw_each_fold(axes["F"], relative_weights(group.last))
            draw_evolution(axes["E"], history, group.maps)
            draw_legend(part, group.maps)
            axes["E"].set_title(
                "Share of each map over the training, in %, mean of the folds that got as far", loc="left"
            )
        for key in "SOFE":
            _align([axes[key] for axes in columns])
        for axes, group, history in zip(columns, groups, epochs, strict=True):
            finish_evolution(axes["E"], history, group.maps)


def _mean_over_folds(group: Group) -> list[dict[str, float]]:
    """For each epoch the share of each map, the mean of the folds that got as far."""
    of_folds = pd.concat([share_of_each(history) for history in group.histories.values()], keys=group.histories)
    return of_folds.groupby(level=1).mean().to_dict("records")


def _align(axes: Sequence[Axes]) -> None:
    """Give axes beside each other the same range of values."""
    lows, highs = zip(*(ax.get_ylim() for ax in axes), strict=True)
    for ax in axes:
        ax.set_ylim(min(lows), max(highs))


@contextmanager
def drawing(file: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure, in inches, that is written as PNG at the end of the block, whole or not at all."""
    # nnU-Net's own plots change matplotlib's global settings
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replacing(file) as temporary:
            figure.savefig(temporary, format="png", dpi=min(110, LONGEST / max(width, height)))


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
    operators = list(dict.fromkeys(m.operator for m in maps))
    subsets = list(dict.fromkeys(m.subset for m in maps))
    table = np.full((len(operators), len(subsets)), np.nan)
    for m in maps:
        table[operators.index(m.operator), subsets.index(m.subset)] = values.get(m.name, np.nan)
    image = ax.imshow(table, cmap=colours, norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(norm(value))
            luminance = 0.299 * red + 0.587 * green + 0.114 * blue
            colour = "black" if luminance > 0.5 else "white"
            ax.text(column, row, with_minus(f"{value:{form}}"), ha="center", va="center", color=colour, fontsize=9)
    ax.set_yticks(range(len(operators)), operators)
    ax.set_xticks(range(len(subsets)), subsets, rotation=0 if len(subsets) < 12 else 45)
    ax.set_xlabel("scales, 0 is the finest")


def draw_evolution(ax: Axes, history: Sequence[Mapping[str, float]], maps: Sequence[Map]) -> None:
    """Draw the weight of each map over epochs, in %; :func:`finish_evolution` completes it.

    Args:
        ax: where; its axis of weights becomes logarithmic.
        history: for each epoch the weight of each map by name, as a share; the last epoch must have all.
        maps: in any order.
    """
    colours = _choose_colours(maps)
    is_point = sum(map(bool, history)) == 1  # a line needs two epochs with weights
    for m in maps:
        weights = np.array([100 * epoch.get(m.name, np.nan) for epoch in history])
        weights[weights == 0] = np.nan  # a logarithmic axis has no zero
        ax.plot(weights, color=colours[m.operator], marker="o" if is_point else None, linewidth=1, alpha=0.7)
    ax.set_yscale("log")
    ax.set_xlabel("epoch")
    room = 0.5 if is_point else 0
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlim(-room, len(history) - 1 + room)


def finish_evolution(ax: Axes, history: Sequence[Mapping[str, float]], maps: Sequence[Map]) -> None:
    """Choose ticks and write names beside the ends of lines, once the range of values is final.

    Args:
        ax, history, maps: as for :func:`draw_evolution`.
    """
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else range(1, 10)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    colours = _choose_colours(maps)
    last = {m: 100 * history[-1][m.name] for m in maps}
    named = sorted(_choose_lines(last), key=last.__getitem__)
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = spread([to_axes.transform((0, last[m]))[1] for m in named], LABEL_DISTANCE)
    for m, height in zip(named, heights, strict=True):
        colour = colours[m.operator]
        ax.annotate(
            m.name,
            (len(history) - 1, last[m]),
            (1.02, height),
            textcoords="axes fraction",
            verticalalignment="center",
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def _choose_lines(last: Mapping[Map, float]) -> list[Map]:
    """Of each operator the heaviest and the lightest map, without maps without weight.

    Where several have the same weight, it is the first of them in the order of the maps.
    """
    drawn = [m for m, weight in last.items() if weight > 0]
    chosen: list[Map] = []
    for operator in dict.fromkeys(m.operator for m in drawn):
        own = [m for m in drawn if m.operator == operator]
        chosen += dict.fromkeys([max(own, key=last.__getitem__), min(own, key=last.__getitem__)])
    return chosen


def draw_legend(figure: FigureBase, maps: Sequence[Map]) -> None:
    """Write below a figure which operator has which colour in :func:`draw_evolution`."""
    colours = _choose_colours(maps)
    lines = [Line2D([], [], color=colour) for colour in colours.values()]
    figure.legend(lines, list(colours), loc="outside lower center", ncols=len(lines), frameon=False)


def _choose_colours(maps: Sequence[Map]) -> dict[str, ColorType]:
    """A colour for each operator, in the order of the maps."""
    operators = list(dict.fromkeys(m.operator for m in maps))
    return dict(zip(operators, cycle(matplotlib.color_sequences["tab10"]), strict=False))


def spread(heights: Sequence[float], distance: float) -> list[float]:
    """Move heights apart as little as can be, by least squares, so that names beside them don't overlap.

    Args:
        heights: ascending.
        distance: between two of the results, which are between 0 and 1; less where there isn't so much room.

    >>> [round(height, 3) for height in spread([0.1, 0.5, 0.5, 1.0], 0.1)]
    [0.1, 0.45, 0.55, 1.0]
    """
    if len(heights) < 2:
        return list(heights)
    steps = min(distance, 1 / (len(heights) - 1)) * np.arange(len(heights))
    # without its steps the result is the nearest sequence that doesn't descend
    without_steps = isotonic_regression(heights - steps).x
    placed = np.clip(without_steps, 0, 1 - steps[-1]) + steps
    return placed.tolist()


def _draw_differences(ax: Axes, differences: pd.Series, top: float, maps: Sequence[Map]) -> None:
    """The heat map of what LoMix changed."""
    draw_heat_map(ax, differences.to_dict(), maps, TwoSlopeNorm(0, -top, top), "RdBu_r", "+.0f")
    ax.set_facecolor("#e4e4e4")  # where there is no map; white is an equal weight
    ax.set_title("Weight of each map against equal weights, in %, mean over folds", loc="left")


def _draw_shares(ax: Axes, kind: str, part: pd.DataFrame) -> None:
    """Bars for scales or operators, as ``kind`` says; ``part`` is as from :func:`~.summary.shares`."""
    part = 100 * part
    positions = np.arange(len(part))
    ax.bar(positions, part["mean"], color="#7fa8d1", width=0.6)
    ax.hlines(part["equal"], positions - 0.4, positions + 0.4, color="black", lw=1.5, ls="--", label="equal weights")
    if folds_differ(part):
        error = [part["mean"] - part["low"], part["high"] - part["mean"]]
        ax.errorbar(positions, part["mean"], error, fmt="none", capsize=4, ecolor="#33475b", label="range over folds")
    ax.set_xticks(positions, part.index)
    ax.set_ylim(0, 1.35 * max(part["high"].max(), part["equal"].max()))  # room for the legend
    ax.set_xlabel(kind)
    ax.legend(loc="upper right", frameon=False, ncols=2, fontsize=8)
    ax.set_title(f"Share of each {kind}, in %", loc="left")


def _draw_each_fold(ax: Axes, relative: pd.DataFrame) -> None:
    order = relative.mean(axis=1).sort_values(ascending=False, kind="stable").index
    for fold, marker in zip(relative, cycle(MARKERS), strict=False):
        ax.plot(range(len(order)), relative.loc[order, fold], marker, ms=5, alpha=0.7, label=fold)
    ax.plot(range(len(order)), relative.loc[order].mean(axis=1), color="black", lw=1, label="mean")
    ax.axhline(1, color="black", lw=1, ls="--", label="equal weights")
    ax.set_xticks(range(len(order)), order, rotation=90)
    ax.set_ylim(bottom=0)
    ax.margins(x=0.02)
    ax.legend(loc="upper right", frameon=False, fontsize=8, ncols=2)  # sorted: the lightest are there
    ax.set_title("Each fold: weight as a multiple of equal weights", loc="left")
