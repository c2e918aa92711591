"""The picture of the weights, of one training and of several: a column for each group of folds."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, MaxNLocator
from matplotlib.typing import ColorType

from nnunet_lomix.files import replacing
from nnunet_lomix.loss.maps import Map
from nnunet_lomix.weights.summary import Group, shares

EXTREME = 3  # times an equal weight, or a third of it: from there on colours don't change
LOWEST = 0.01  # % of the weight; lines end there
LONGEST = 65_000  # pixels along an axis; Matplotlib can't draw more than 2¹⁶
LABEL_DISTANCE = 0.055  # between names of lines, as a part of the height of the axes


def draw_weights(groups: Sequence[Group], file: Path) -> None:
    """Write what :func:`make_figure` makes of the groups as PNG, whole or not at all."""
    # nnU-Net's own plots change matplotlib's global settings
    with matplotlib.rc_context(matplotlib.rcParamsDefault), replacing(file) as temporary:
        figure = make_figure(groups)
        figure.savefig(temporary, format="png", dpi=min(110, LONGEST / max(figure.get_size_inches())))


def make_figure(groups: Sequence[Group]) -> Figure:
    """The last weights as a heat map, the shares of operators and scales, and all weights over the epochs.

    Axes and colours are the same for all groups.

    Args:
        groups: at least one, each with at least one epoch.
    """
    widths = [8 + 0.55 * len({m.subset for m in group.maps}) for group in groups]
    figure = Figure(figsize=(sum(widths), 9), layout="constrained")
    parts = figure.subfigures(1, len(groups), squeeze=False, width_ratios=widths)[0]
    columns = [part.subplot_mosaic("HHHO;EEES") for part in parts]
    for part, axes, group, width in zip(parts, columns, groups, widths, strict=True):
        axes["S"].sharex(axes["O"])
        axes["S"].invert_yaxis()
        axes["O"].sharey(axes["H"])  # each bar beside its row
        axes["O"].tick_params(labelleft=False)
        if axes is not columns[0]:
            axes["O"].sharex(columns[0]["O"])
            axes["E"].sharey(columns[0]["E"])
        part.suptitle(fill(group.name, int(8 * width)), fontweight="bold")
        colours, table = _choose_colours(group.maps), shares(group)
        _draw_heat_map(axes["H"], part, group, colours)
        _draw_shares(axes["O"], "Operators, in %", table.loc["operator"], list(colours.values()))
        _draw_shares(axes["S"], "Scales, in %", table.loc["scale"], ["silver"])
        _draw_evolution(axes["E"], group, colours)
    for axes, group in zip(columns, groups, strict=True):
        _name_lines(axes["E"], group, _choose_colours(group.maps))
    return figure


def _draw_heat_map(ax: Axes, part: SubFigure, group: Group, colours: Mapping[str, ColorType]) -> None:
    """Operators below each other, subsets of the scales beside each other; white is an equal weight."""
    operators, subsets = list(colours), list(dict.fromkeys(m.subset for m in group.maps))
    share, relative = group.last.mean(axis=1), group.relative.mean(axis=1)
    table = np.full((len(operators), len(subsets)), np.nan)
    for m in group.maps:
        row, column = operators.index(m.operator), subsets.index(m.subset)
        table[row, column] = max(relative[m.name], 1e-9)  # a logarithm has no zero
        colour = "black" if 0.5 < relative[m.name] < 2 else "white"
        ax.text(column, row, f"{100 * share[m.name]:.1f}", ha="center", va="center", color=colour, fontsize=9)
    image = ax.imshow(table, cmap="RdBu_r", norm=LogNorm(1 / EXTREME, EXTREME), aspect="auto")
    ax.set_facecolor("#e8e8e8")  # where there is no map
    bar = part.colorbar(image, ax=ax, location="left", extend="both")
    bar.set_ticks([1 / 3, 1 / 2, 1, 2, 3], labels=["⅓", "½", "1", "2", "3"])
    bar.ax.minorticks_off()
    bar.set_label("times an equal weight")
    ax.set_yticks(range(len(operators)), operators)
    for label, operator in zip(ax.get_yticklabels(), operators, strict=True):
        label.set_color(colours[operator])
    ax.set_xticks(range(len(subsets)), subsets, rotation=0 if len(subsets) < 12 else 45)
    ax.set_xlabel("scales, 0 is the finest")
    when = max(map(len, group.histories.values())) - 1
    ax.set_title(f"Weight of each map after epoch {when}, in %{_mean_of(group)}", loc="left")


def _mean_of(group: Group) -> str:
    return f" (mean of {len(group.histories)} folds)" if len(group.histories) > 1 else ""


def _draw_shares(ax: Axes, title: str, table: pd.DataFrame, colours: Sequence[ColorType]) -> None:
    """A bar for each scale or operator, with its range over folds; ``table`` is a part of :func:`~.summary.shares`."""
    table, places = 100 * table, np.arange(len(table))
    error = [table["mean"] - table["low"], table["high"] - table["mean"]]
    ax.barh(places, table["mean"], 0.6, xerr=error, color=colours)
    ax.vlines(table["equal"], places - 0.4, places + 0.4, color="black", ls="--")
    ax.set_yticks(places, table.index)
    ax.set_xlim(left=0)
    ax.set_xlabel("dashed: equal weights")
    ax.set_title(title, loc="left")


def _average(group: Group) -> pd.DataFrame:
    """Mean over folds, for each epoch of those that got as far, in % of the weight of a fold's first epoch.

    So it stays visible that the paper's free weights fade. NaN below the range of the picture.
    """
    totals = {fold: history.sum(axis=1, min_count=1).dropna().iloc[0] for fold, history in group.histories.items()}
    of_folds = pd.concat({fold: 100 * history / totals[fold] for fold, history in group.histories.items()})
    history = of_folds.groupby(level=1).mean()
    return history.where(history >= LOWEST)


def _draw_evolution(ax: Axes, group: Group, colours: Mapping[str, ColorType]) -> None:
    history = _average(group)
    is_point = history.notna().any(axis=1).sum() == 1  # a line needs two epochs with weights
    for m in group.maps:
        ax.plot(history[m.name], color=colours[m.operator], marker="o" if is_point else None, lw=1, alpha=0.6)
    equal = 100 / len(group.maps)
    ax.axhline(equal, color="black", lw=1, ls="--")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, equal / 2), max(high, 2 * equal))  # a tick, whatever the weights
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    room = 0.5 if is_point else 0
    ax.set_xlim(-room, len(history) - 1 + room)
    ax.set_xlabel("epoch")
    ax.set_title(f"Weight of each map over the training, in %{_mean_of(group)}", loc="left")


def _name_lines(ax: Axes, group: Group, colours: Mapping[str, ColorType]) -> None:
    """Write beside the ends of lines, once the range of weights is final, the heaviest and lightest of each operator.

    Where several maps have the same weight, it is the first of them in the order of the maps.
    """
    history = _average(group)
    last = {m: history[m.name].iloc[-1] for m in group.maps if history[m.name].notna().iloc[-1]}
    named: list[Map] = []
    for operator in colours:
        own = [m for m in last if m.operator == operator]
        named += dict.fromkeys([max(own, key=last.__getitem__), min(own, key=last.__getitem__)] if own else [])
    if not named:  # the paper's free weights, once they have faded
        return
    named.sort(key=last.__getitem__)
    to_axes = ax.transData + ax.transAxes.inverted()
    steps = min(LABEL_DISTANCE, 1 / max(1, len(named) - 1)) * np.arange(len(named))
    # each at the end of its line, or as little above or below it as the others leave room, and all beside the axes
    ends = np.array([to_axes.transform((0, last[m]))[1] for m in named]) - steps
    without_steps = (np.maximum.accumulate(ends) + np.minimum.accumulate(ends[::-1])[::-1]) / 2
    heights = np.clip(without_steps, 0, 1 - steps[-1]) + steps
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


def _choose_colours(maps: Sequence[Map]) -> dict[str, ColorType]:
    """A colour for each operator, in the order of the maps."""
    operators = dict.fromkeys(m.operator for m in maps)
    return dict(zip(operators, cycle(matplotlib.color_sequences["tab10"]), strict=False))
