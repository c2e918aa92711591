"""The tables of a report: numbers as people read them, Dice, NSD and IoU in points (0 to 100), HD95 in mm or pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nnunet_lomix.compare.metrics import METRICS
from nnunet_lomix.compare.statistics import MEAN, is_about_networks, verdict

# columns of a comparison that are in the unit of the metric
_MEASURED = (
    *("mean", "low", "high"),
    *("reference_mean", "reference_low", "reference_high"),
    *("difference", "difference_low", "difference_high"),
)


@dataclass(frozen=True)
class Row:
    """A trainer in a class, as text.

    ``number`` counts the trainers, and the reference, 0, has no difference. ``about`` says what a verdict other than
    undecided is about, if not about the trainers.
    """

    trainer: str
    number: int
    mean: str
    mean_interval: str
    difference: str = ""
    interval: str = ""
    p: str = ""
    verdict: str = ""
    about: str = ""
    counts: str = ""


@dataclass(frozen=True)
class Group:
    """The rows of a class, or of the mean over classes: the reference first."""

    name: str
    rows: list[Row]


@dataclass(frozen=True)
class MetricTable:
    """The table of one metric, in one unit."""

    metric: str
    unit: str
    groups: list[Group]

    @property
    def title(self) -> str:
        """
        >>> MetricTable("HD95", "mm", []).title
        'HD95, mm, lower is better'
        """
        return f"{self.metric}, {self.direction}"

    @property
    def direction(self) -> str:
        """The unit, and what is better."""
        return f"{self.unit}, {'lower' if METRICS[self.metric].lower_is_better else 'higher'} is better"

    @property
    def means(self) -> Group:
        """The rows of the mean over classes; one class alone is its own mean."""
        return self.groups[-1]


@dataclass(frozen=True)
class Extremes:
    """The cases in which a candidate gains and loses most in a metric, each with its difference."""

    trainer: str
    metric: str
    best: tuple[str, str]
    worst: tuple[str, str]


def make_table(rows: pd.DataFrame, unit: str) -> MetricTable:
    """The table of one metric, from its rows of a comparison; ``unit`` is the metric's."""
    groups = []
    for name in shown_classes(rows):
        records = in_shown_units(rows[rows["class"] == name])
        first = records[0]
        mean = _format_mean(first["reference_mean"], first["reference_low"], first["reference_high"])
        reference = Row(first["reference"], 0, *mean)
        groups.append(Group(str(name), [reference, *(_make_row(record, i) for i, record in enumerate(records, 1))]))
    return MetricTable(rows["metric"].iloc[0], unit, groups)


def _make_row(record: dict[str, Any], number: int) -> Row:
    ends = [record["difference_low"], record["difference_high"]]
    judged = verdict(record)
    return Row(
        record["trainer"],
        number,
        *_format_mean(record["mean"], record["low"], record["high"]),
        difference=signed(record["difference"]),
        interval="–" if np.isnan(ends).any() else f"{signed(ends[0])} to {signed(ends[1])}",
        p=format_p(record["p_holm"]),
        verdict=judged,
        about=name_networks(record) if judged != "undecided" and is_about_networks(record) else "",
        counts=f"{record['wins']}:{record['ties']}:{record['losses']}",
    )


def _format_mean(mean: float, low: float, high: float) -> tuple[str, str]:
    return f"{mean:.2f}", "–" if np.isnan([low, high]).any() else f"{low:.2f} to {high:.2f}"


def name_networks(row: Mapping[str, Any]) -> str:
    """What was compared, where a trainer has a single training; ``row`` is of a comparison."""
    return "these two networks" if len(row["by_seed"]) == len(row["reference_by_seed"]) == 1 else "these networks"


def signed(value: float, digits: int = 2) -> str:
    """With sign, and the minus that is as wide as the plus.

    >>> signed(-1.234), signed(0.5, 1)
    ('−1.23', '+0.5')
    """
    return f"{value:+.{digits}f}".replace("-", "−")


def format_p(p: float) -> str:
    """
    >>> format_p(0.0004), format_p(0.04), format_p(float("nan"))
    ('<0.001', '0.040', '–')
    """
    if np.isnan(p):
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def shown_classes(rows: pd.DataFrame) -> list[str]:
    """All classes and their mean; one class alone is its own mean."""
    classes = list(rows["class"].unique())
    return classes if len(classes) > 2 else classes[:1]


def in_shown_units(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a comparison, with their numbers in the units that are shown."""
    records = rows.to_dict("records")
    for record in records:
        factor = METRICS[record["metric"]].factor
        record.update({column: factor * record[column] for column in _MEASURED})
        for column in ("by_seed", "reference_by_seed"):
            record[column] = [factor * value for value in record[column]]
    return records


def by_case(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Scores of one metric in the unit that is shown, seeds averaged: a row for each case, columns (class, trainer).

    The classes are in their order in ``scores``, ``mean`` comes last; so are the trainers.
    """
    own = scores[scores["metric"] == metric]
    table = own.pivot_table(index="case", columns=["class", "trainer"], values="value", sort=False)
    table = METRICS[metric].factor * table
    means = table.T.groupby(level="trainer", sort=False).mean().T
    means.columns = pd.MultiIndex.from_product([[MEAN], means.columns], names=table.columns.names)
    return table.join(means)


def differences_by_case(scores: pd.DataFrame, metric: str, trainer: str, reference: str) -> pd.DataFrame:
    """Candidate − reference in the unit that is shown: a row for each case, a column for each class, and ``mean``."""
    table = by_case(scores, metric)
    return table.xs(trainer, axis=1, level="trainer") - table.xs(reference, axis=1, level="trainer")


def list_extremes(scores: pd.DataFrame, means: pd.DataFrame, units: Mapping[str, str]) -> list[Extremes]:
    """For each candidate and metric the best and the worst case, by the mean over classes.

    Args:
        scores: of all cases.
        means: the rows ``mean`` of their comparison.
        units: of each metric.
    """
    extremes = []
    for row in means.to_dict("records"):
        changes = differences_by_case(scores, row["metric"], row["trainer"], row["reference"])[MEAN]
        best, worst = ((row[end], f"{signed(changes[row[end]])} {units[row['metric']]}") for end in ("best", "worst"))
        extremes.append(Extremes(row["trainer"], row["metric"], best, worst))
    return extremes


@dataclass(frozen=True)
class CaseRow:
    """A case: the mean over classes of each trainer, and each candidate's difference, as text."""

    case: str
    means: list[str]
    differences: list[str]


def list_cases(scores: pd.DataFrame, metric: str, trainers: Sequence[str]) -> list[CaseRow]:
    """Every case, from the largest loss of the first candidate to its largest gain."""
    means = by_case(scores, metric)[MEAN][list(trainers)]
    differences = means.sub(means[trainers[0]], axis=0)
    return [
        CaseRow(
            case,
            [f"{means.loc[case, trainer]:.2f}" for trainer in trainers],
            [signed(differences.loc[case, trainer]) for trainer in trainers[1:]],
        )
        for case in differences[trainers[1]].sort_values(kind="stable").index
    ]
