"""All that a report says, in words and tables; how it is shown is for ``terminal``, ``markdown`` and ``page``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nnunet_lomix.compare.metrics import METRICS
from nnunet_lomix.compare.statistics import MEAN, is_about_networks, verdict
from nnunet_lomix.compare.tables import Extremes, MetricTable, in_shown_units, list_extremes, make_table
from nnunet_lomix.compare.words import describe_limits, describe_methods, describe_seeds, headline


@dataclass(frozen=True)
class Headline:
    """What was found for one candidate.

    Attributes:
        verdict: on the first metric.
        about_networks: whether that is about the networks that were compared, and not about their trainers.
        first: the sentence on the first metric.
        seeds: what is known of the variance between trainings.
        others: the sentences on the other metrics.
    """

    verdict: str
    about_networks: bool
    first: str
    seeds: str
    others: list[str]


@dataclass(frozen=True)
class Report:
    """What :func:`describe` gives.

    ``trainers`` has the reference first, ``headlines`` one for each candidate; ``units`` are by metric.
    """

    title: str
    trainers: list[str]
    units: dict[str, str]
    headlines: list[Headline]
    notes: list[str]
    tables: list[MetricTable]
    extremes: list[Extremes]
    methods: list[str]
    facts: dict[str, str]


def describe(scores: pd.DataFrame, comparison: pd.DataFrame, information: Mapping[str, Any]) -> Report:
    """All that a report says; arguments as of :func:`~nnunet_lomix.compare.report.write_report`."""
    trainers = [comparison["reference"].iloc[0], *comparison["trainer"].unique()]
    distance = information.get("distance_unit", "mm")
    units = {metric: METRICS[metric].unit(distance) for metric in comparison["metric"].unique()}
    means = comparison[comparison["class"] == MEAN]
    cases = scores["case"].nunique()
    trained = information.get("configuration")
    return Report(
        title=f"{information.get('dataset')} · {trained}" if trained else "Comparison",
        trainers=trainers,
        units=units,
        headlines=[_make_headline(means[means["trainer"] == trainer], cases, units) for trainer in trainers[1:]],
        notes=[*describe_limits(cases, distance), *(information.get("notes") or [])],
        tables=[make_table(comparison[comparison["metric"] == metric], unit) for metric, unit in units.items()],
        extremes=list_extremes(scores, means, units),
        methods=describe_methods(scores, list(units), information, distance),
        facts=_list_facts(scores, trainers, information),
    )


def _make_headline(means: pd.DataFrame, cases: int, units: Mapping[str, str]) -> Headline:
    """From a candidate's means over classes, a row for each metric."""
    rows = in_shown_units(means)
    first, *others = (headline(row, cases, units[row["metric"]]) for row in rows)
    seeds = describe_seeds(rows[0], units[rows[0]["metric"]])
    return Headline(verdict(rows[0]), is_about_networks(rows[0]), first, seeds, others)


def _list_facts(scores: pd.DataFrame, trainers: Sequence[str], information: Mapping[str, Any]) -> dict[str, str]:
    seeds = scores.groupby("trainer")["seed"].nunique()
    times = information.get("epoch_seconds") or {}
    folds = information.get("folds")
    trained = information.get("configuration")
    folders = information.get("folders") or {}
    facts = {
        "dataset" if trained else "references": information.get("dataset"),
        "configuration": trained,
        "folds": ", ".join(map(str, folds)) if isinstance(folds, (list, tuple)) else folds,
        "labels": information.get("label_source"),
        "cases": scores["case"].nunique(),
        "classes": ", ".join(map(str, scores["class"].unique())),
        "trainings": ", ".join(f"{trainer} {seeds[trainer]}" for trainer in trainers),
        "seconds an epoch": ", ".join(f"{trainer} {times[trainer]:.1f}" for trainer in trainers if times.get(trainer)),
        "versions": ", ".join(f"{name} {version}" for name, version in (information.get("versions") or {}).items()),
        "date": information.get("date"),
        **{f"seeds of {name}" if len(own) > 1 else name: ", ".join(own) for name, own in folders.items()},
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}
