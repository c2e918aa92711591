"""The plots of a comparison, as SVG in the colours of the page around them.

Matplotlib knows no CSS variables, so the plots are drawn in placeholder colours, and the variables (``--ink``,
``--trainer-0``, …) take their place in the text: one picture reads on a light and on a dark page.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunet_lomix.compare.findings import MetricTable

MARKERS = "osD^vP"
SYMBOLS = "●■◆▲▼✚"  # the same in text
WIDTH = 4.6  # inches; as wide as a phone when its text is at reading size

_INK = "#010203"
_TRAINERS = tuple(f"#0{i}0504" for i in range(len(MARKERS)))
_VARIABLES = {_INK: "var(--ink)", **{colour: f"var(--trainer-{i})" for i, colour in enumerate(_TRAINERS)}}
_BAR: dict[str, Any] = {"color": _INK, "lw": 2.2, "solid_capstyle": "butt", "zorder": 3}
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "text.parse_math": False,  # names are no formulas
    "svg.fonttype": "none",  # text stays text, for search and screen readers
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_differences(table: MetricTable, trainers: Sequence[str], trainer: str) -> str:
    """A candidate's paired differences for each class, with their mean and its interval, as an ``<svg>`` element.

    ``trainers`` are all of them, the reference first: a trainer's place gives colour and marker.
    """
    differences = table.subtract(trainer, trainers[0])[table.drawn]
    rows = [table.rows[name, trainer] for name in table.drawn]
    listed = ", ".join(f"{row.name} {row.difference:+.2f} {table.unit}".replace("-", "−") for row in rows)
    with _style():
        figure, ax = _make_panel(table.drawn, 0.42)
        ends = np.abs([(row.difference_low, row.difference_high) for row in rows])
        limit = choose_limit(np.abs(differences.to_numpy()), np.nan_to_num(ends).max())
        for y, row in enumerate(rows):
            _draw_points(ax, differences[row.name].to_numpy(), y, trainers.index(trainer), limit)
            ax.plot([row.difference_low, row.difference_high], [y, y], **_BAR)
            ax.plot(row.difference, y, "d", color=_INK, ms=8, zorder=4)
        ax.axvline(0, color=_INK, lw=1)
        ax.set_xlim(-1.04 * limit, 1.04 * limit)
        ax.set_xlabel(f"difference in {table.unit}")
        left, right = ("← better", "worse →") if table.metric.lower_is_better else ("← worse", "better →")
        ax.set_title(left, loc="left", fontsize=11)
        ax.set_title(right, loc="right", fontsize=11)
        return _to_svg(figure, f"{table.metric.name} of {trainer} minus {trainers[0]}: {listed}")


def draw_distributions(table: MetricTable, trainers: Sequence[str]) -> str:
    """The scores of all cases for each class and trainer, with their median and quartiles, as an ``<svg>`` element."""
    medians = []
    with _style():
        step = 0.8 / len(trainers)
        figure, ax = _make_panel(table.drawn, 0.14 + 0.24 * len(trainers))
        limit = choose_limit(table.values[table.drawn].to_numpy(), 0)
        for row, name in enumerate(table.drawn):
            for i, trainer in enumerate(trainers):
                y = row + step * (i - (len(trainers) - 1) / 2)
                scores = table.values[name, trainer].to_numpy()
                _draw_points(ax, scores, y, i, limit, spread=0.3 * step)
                quartiles = np.percentile(scores, (25, 50, 75))
                medians.append(f"{name}, {trainer} {quartiles[1]:.2f}")
                low, median, high = np.minimum(quartiles, limit)
                ax.plot([low, high], [y, y], **_BAR)
                ax.plot(median, y, "|", color=_INK, ms=11, mew=2.2, zorder=4)
        ax.margins(x=0.04)
        ax.set_xlabel(f"{table.unit}, {'← lower is better' if table.metric.lower_is_better else 'higher is better →'}")
        return _to_svg(figure, f"{table.metric.name} of all cases, {table.unit}; medians: {'; '.join(medians)}")


def draw_curves(curves: pd.DataFrame, trainers: Sequence[str]) -> str:
    """Pseudo Dice over the epochs, as an ``<svg>`` element: each training thin, the mean over a trainer's bold.

    ``curves`` are those of a :class:`~nnunet_lomix.compare.Source`; trainers without curves are left out.
    """
    with _style():
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        ax = figure.subplots()
        for i, trainer in enumerate(trainers):
            own = curves[curves["trainer"] == trainer]
            if own.empty:
                continue
            trainings = 100 * own.pivot(index="epoch", columns=["seed", "fold"], values="pseudo_dice")
            colour = _TRAINERS[i % len(_TRAINERS)]
            if trainings.shape[1] > 1:
                ax.plot(trainings, color=colour, lw=0.8, alpha=0.45)
            # where one training was shorter, a mean of the others would jump
            mean = trainings.dropna().mean(axis=1)
            marker = MARKERS[i % len(MARKERS)]
            ax.plot(mean, color=colour, lw=2, marker=marker, ms=5, markevery=max(1, len(mean) // 12))
        ax.set_xlabel("epoch")
        ax.set_ylabel("pseudo Dice, points")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.grid(color=_INK, alpha=0.15, lw=0.8)
        return _to_svg(figure, f"Pseudo Dice over the epochs of {', '.join(trainers)}.")


@contextmanager
def _style() -> Iterator[None]:
    # nnU-Net's own plots change matplotlib's global settings
    with matplotlib.rc_context(matplotlib.rcParamsDefault), matplotlib.rc_context(_STYLE):
        yield


def _make_panel(classes: Sequence[str], row_height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 0.9 + row_height * len(classes)), layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(classes)), [fill(str(name), 14) for name in classes])
    ax.set_ylim(len(classes) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x", color=_INK, alpha=0.15, lw=0.8)
    ax.set_axisbelow(True)
    return figure, ax


def choose_limit(sizes: np.ndarray, at_least: float) -> float:
    """Where an axis ends: at the largest value, unless a few are far beyond all others, as an empty mask's HD95 is."""
    needed = 1.1 * at_least
    largest = max(float(sizes.max()), needed)
    usual = max(2.5 * float(np.quantile(sizes, 0.9)), needed)
    return min(usual, largest) or largest or 1.0


def _draw_points(ax: Axes, values: np.ndarray, y: float, number: int, limit: float, spread: float = 0.28) -> None:
    """Points beyond the limit become triangles at the edge."""
    heights = y + np.random.default_rng(0).uniform(-spread, spread, len(values))
    colour = _TRAINERS[number % len(_TRAINERS)]
    style: dict[str, Any] = {"linestyle": "none", "color": colour, "mec": "none", "alpha": 0.6, "clip_on": False}
    inside = np.abs(values) <= limit
    ax.plot(values[inside], heights[inside], MARKERS[number % len(MARKERS)], ms=4.5, **style)
    for side, marker in ((1, ">"), (-1, "<")):
        beyond = ~inside & (side * values > 0)
        ax.plot(np.full(beyond.sum(), side * limit), heights[beyond], marker, ms=6, **style)


def _to_svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    # Matplotlib makes the ids of markers and clips from this salt: two pictures of a page must not share an id, or one
    # is drawn with the other's markers
    with matplotlib.rc_context({"svg.hashsalt": title}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the declaration of a document
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # groups are numbered alike in all pictures, and nothing refers to them
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
