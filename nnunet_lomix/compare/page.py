"""A report as one HTML file that needs nothing else; what it looks like is in ``report.html``."""

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from nnunet_lomix.compare import overlays, plots
from nnunet_lomix.compare.content import Report
from nnunet_lomix.compare.metrics import METRICS
from nnunet_lomix.compare.sources import CaseFiles
from nnunet_lomix.compare.statistics import MEAN
from nnunet_lomix.compare.tables import (
    by_case,
    differences_by_case,
    in_shown_units,
    list_cases,
    shown_classes,
    signed,
)
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.errors import describe as describe_error

SHOWN_CASES = 4


@dataclass(frozen=True)
class Plot:
    """The plot of a metric; of differences, with the candidate and its number among the trainers."""

    metric: str
    svg: Markup
    trainer: str = ""
    number: int = 0


@dataclass(frozen=True)
class Panel:
    """A prediction over the image: a PNG in base64, and its score in the first metric."""

    trainer: str
    number: int
    score: str
    png: str


@dataclass(frozen=True)
class Overlay:
    """A case and the slice that is shown, in words, with a panel for each trainer."""

    case: str
    where: str
    panels: list[Panel]


def to_html(
    report: Report,
    scores: pd.DataFrame,
    comparison: pd.DataFrame,
    classes: Mapping[str, int | Sequence[int]],
    curves: pd.DataFrame,
    files: Mapping[str, CaseFiles],
) -> str:
    """The page.

    Args:
        report: as of :func:`~nnunet_lomix.compare.content.describe`.
        scores, comparison, curves, files: as of :func:`~nnunet_lomix.compare.report.write_report`.
        classes: the values of each class or region; empty if they aren't known.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["folding"] = _fold
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    first = report.tables[0]
    legend = _name_values(classes)
    pictures, undrawn = _draw_overlays(scores, first.metric, report.trainers, files, list(legend) or None)
    return template.render(
        report=report,
        symbols=plots.SYMBOLS,
        class_colours=overlays.CLASS_COLOURS,
        differences=[
            _plot_differences(scores, comparison, metric, unit, trainer, number)
            for number, trainer in enumerate(report.trainers[1:], 1)
            for metric, unit in report.units.items()
        ],
        distributions=[
            _plot_distributions(scores, comparison, metric, unit, report.trainers)
            for metric, unit in report.units.items()
        ],
        curves=_plot_curves(curves, report.trainers),
        trainers_with_curves=[trainer for trainer in report.trainers if trainer in set(curves["trainer"])],
        overlays=pictures,
        undrawn=undrawn,
        legend=legend,
        several_seeds=scores["seed"].nunique() > 1,
        without_images=any(case.image is None for case in files.values()),
        cases=list_cases(scores, first.metric, report.trainers),
        first_metric=f"{first.metric}, {first.unit}",
    )


def _fold(name: str) -> Markup:
    """Lets a browser break a trainer's name behind nnUNetTrainer and before an underscore."""
    return Markup("<wbr>").join(map(escape, re.split(r"(?<=^nnUNetTrainer)|(?=_)", name)))


def _plot_differences(
    scores: pd.DataFrame, comparison: pd.DataFrame, metric: str, unit: str, trainer: str, number: int
) -> Plot:
    rows = comparison[(comparison["metric"] == metric) & (comparison["trainer"] == trainer)]
    classes = shown_classes(rows)
    reference = rows["reference"].iloc[0]
    lower_is_better = METRICS[metric].lower_is_better
    means = pd.DataFrame(in_shown_units(rows)).set_index("class").loc[classes]
    listed = ", ".join(f"{name} {signed(value)} {unit}" for name, value in means["difference"].items())
    title = f"{metric} of {trainer} minus {reference}: {listed}"
    values = differences_by_case(scores, metric, trainer, reference)[classes]
    svg = _draw(plots.draw_differences, values, means, number, unit, lower_is_better, title)
    return Plot(metric, svg, trainer, number)


def _plot_distributions(
    scores: pd.DataFrame, comparison: pd.DataFrame, metric: str, unit: str, trainers: Sequence[str]
) -> Plot:
    classes = shown_classes(comparison[comparison["metric"] == metric])
    values = by_case(scores, metric)[[(name, trainer) for name in classes for trainer in trainers]]
    medians = "; ".join(f"{name}, {trainer} {value:.2f}" for (name, trainer), value in values.median().items())
    title = f"{metric} of all cases, {unit}; medians: {medians}"
    direction = "← lower is better" if METRICS[metric].lower_is_better else "higher is better →"
    return Plot(metric, _draw(plots.draw_distributions, values, f"{unit}, {direction}", title))


def _plot_curves(curves: pd.DataFrame, trainers: Sequence[str]) -> Markup | None:
    if curves.empty:
        return None
    return _draw(plots.draw_curves, curves, trainers, f"Pseudo Dice over the epochs of {', '.join(trainers)}.")


def _draw(draw: Callable[..., str], *arguments: Any) -> Markup:
    """An SVG, or a line in its place: a picture that fails must not cost the page."""
    try:
        return Markup(draw(*arguments))
    except Exception as error:
        return Markup('<p class="soft">This picture could not be drawn ({}).</p>').format(_explain(error))


def _explain(error: Exception) -> str:
    return str(error) if isinstance(error, LoMixError) else describe_error(error)


def _draw_overlays(
    scores: pd.DataFrame,
    metric: str,
    trainers: Sequence[str],
    files: Mapping[str, CaseFiles],
    values: Sequence[int] | None,
) -> tuple[list[Overlay], list[str]]:
    """The cases in which any candidate's first seed differs most from the reference's, the most different first.

    Returns:
        Their pictures, and the cases that can't be drawn, each with the reason.
    """
    means = by_case(scores[scores["seed"] == 0], metric)[MEAN]  # the files are those of the first seed
    largest = means.sub(means[trainers[0]], axis=0).abs().max(axis=1).sort_values(ascending=False, kind="stable")
    drawn, undrawn = [], []
    for case in [case for case in largest.index[largest > 0] if case in files][:SHOWN_CASES]:
        try:
            pictures, where = overlays.draw_overlays(files[case], values)
        except Exception as error:  # as for _draw
            undrawn.append(f"{case} ({_explain(error)})")
            continue
        panels = [
            Panel(trainer, trainers.index(trainer), f"{means.loc[case, trainer]:.1f}", base64.b64encode(png).decode())
            for trainer, png in pictures.items()
        ]
        drawn.append(Overlay(case, where, panels))
    return drawn, undrawn


def _name_values(classes: Mapping[str, int | Sequence[int]]) -> dict[int, str]:
    """For each value of a segmentation the classes, or regions, that it belongs to.

    >>> _name_values({"organ": (1, 2), "tumour": 2})
    {1: 'organ', 2: 'organ + tumour'}
    """
    names: dict[int, list[str]] = {}
    for name, values in classes.items():
        for value in np.atleast_1d(values):
            names.setdefault(int(value), []).append(str(name))
    return {value: " + ".join(names[value]) for value in sorted(names) if value}
