"""What a comparison says, in sentences and in numbers as people read them; how it is shown is for ``report``.

For people, shares such as Dice are in points (0 to 100); distances are in mm, or in pixels where files have no scale.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd

from nnunet_lomix.compare.metrics import METRICS, Metric
from nnunet_lomix.compare.scoring import ScoringSettings
from nnunet_lomix.compare.sources import MEAN, Source
from nnunet_lomix.compare.statistics import ENOUGH, largest_coverage

MOST_DRAWN = 12  # classes in a plot: what a reader can look at
STATISTICS = (
    "Seeds are averaged within each case. 95 % intervals of means over cases: BCa bootstrap, expanded, 9999 resamples. "
    "p: Wilcoxon's signed-rank test, two-sided; p_holm: Holm's correction over classes and candidates within a metric. "
    "Both are about other cases, and leave out how much another training would differ."
)


@dataclass(frozen=True)
class Comparison:
    """What :func:`~nnunet_lomix.compare.compare` gives.

    Attributes:
        source: the files, and the learning curves.
        settings: how they were scored.
        scores: the table from :func:`~nnunet_lomix.compare.scoring.score`.
        comparison: as from :func:`~nnunet_lomix.compare.statistics.compare_trainers`.
        notes: sentences that a reader should know.
    """

    source: Source
    settings: ScoringSettings
    scores: pd.DataFrame
    comparison: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def information(self) -> dict[str, Any]:
        """How this was made, in values that JSON knows.

        ``dataset``, ``configuration``, ``folds``, ``trainers``, ``folders`` (of each trainer, one for each seed),
        ``cases`` (their number), ``classes`` and ``label_source``, ``distance_unit`` (mm or pixels), ``tolerance_mm``
        or ``tolerance_pixels``, ``metrics`` (what they are), ``statistics``, ``notes``, ``epoch_seconds`` (median of
        each trainer that has curves; nnU-Net logs no memory), ``versions`` and ``date``.
        """
        source = self.source
        packages = ("nnunet_lomix", "nnunetv2", "monai", "torch", "numpy", "scipy")
        return {
            "dataset": source.dataset,
            "configuration": source.configuration,
            "folds": list(source.folds),
            "trainers": source.trainers,
            "folders": {n: [str(f) for (name, _), f in source.folders.items() if name == n] for n in source.trainers},
            "cases": len(source.references),
            "classes": {name: list(values) for name, values in source.labels.items()},
            "label_source": source.label_source,
            "distance_unit": source.distance_unit,
            f"tolerance_{source.distance_unit}": self.settings.tolerance,
            "metrics": self.explain_metrics(),
            "statistics": STATISTICS,
            "notes": list(self.notes),
            "epoch_seconds": source.curves.groupby("trainer", sort=False)["seconds"].median().to_dict(),
            "versions": {package: version(package) for package in packages},
            "date": date.today().isoformat(),
        }

    def explain_metrics(self) -> str:
        """What the metrics are, a sentence each."""
        unit, tolerance = self.source.distance_unit, self.settings.tolerance
        with_unit = f"{tolerance:g} {unit.removesuffix('s') if tolerance == 1 else unit}"
        return " ".join(METRICS[name].sentence.format(tolerance=with_unit) for name in self.settings.metrics)


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
class MetricTable:
    """All that is known in one metric, in the unit that is shown.

    Attributes:
        metric: which.
        unit: that is shown.
        groups: the rows of each class and, if there are several, of the mean over classes, which comes last; the
            reference's first.
        values: each score, seeds averaged: a row for each case, columns (class, trainer).
        rows: for each class and candidate its row of the comparison.
        drawn: the classes that are drawn: those in which a candidate's mean differs most, and the mean over classes.
    """

    metric: Metric
    unit: str
    groups: dict[str, list[Row]]
    values: pd.DataFrame
    rows: dict[tuple[str, str], Any]
    drawn: list[str]

    @property
    def title(self) -> str:
        return f"{self.metric.name}, {self.direction}"

    @property
    def direction(self) -> str:
        """The unit, and what is better."""
        return f"{self.unit}, {'lower' if self.metric.lower_is_better else 'higher'} is better"

    @property
    def means(self) -> list[Row]:
        """The rows of the mean over classes; one class alone is its own mean."""
        return list(self.groups.values())[-1]

    def subtract(self, trainer: str, reference: str) -> pd.DataFrame:
        """Paired differences: a row for each case, a column for each class."""
        candidate, other = (self.values.xs(name, axis=1, level="trainer") for name in (trainer, reference))
        return candidate - other


@dataclass(frozen=True)
class Headline:
    """What was found for one candidate: the verdict on the first metric, and sentences.

    ``about_networks`` says that the verdict is about the networks that were compared, and not about their trainers.
    ``first`` is on the first metric, ``others`` on the others, ``seeds`` on the variance between trainings.
    """

    verdict: str
    about_networks: bool
    first: str
    seeds: str
    others: list[str]


@dataclass(frozen=True)
class Findings:
    """What :func:`describe` gives.

    ``trainers`` has the reference first, ``headlines`` one for each candidate, ``tables`` one for each metric.
    ``extremes`` are rows of trainer, metric, best case, its difference, worst case and its difference. ``cases`` has
    the means of all trainers in the first metric and then the candidates' differences, from the first candidate's
    largest loss to its largest gain. ``differing`` has the scores of the first seeds, by case and trainer, where they
    differ in the first metric, the most different case first.
    """

    result: Comparison
    title: str
    trainers: list[str]
    headlines: list[Headline]
    notes: list[str]
    tables: list[MetricTable]
    extremes: list[tuple[str, ...]]
    cases: dict[str, list[str]]
    differing: dict[str, dict[str, str]]
    methods: list[str]
    facts: dict[str, str]


def describe(result: Comparison) -> Findings:
    """All that a report says."""
    source = result.source
    reference, *candidates = source.trainers
    tables = [_make_table(result, METRICS[name]) for name in result.settings.metrics]
    return Findings(
        result=result,
        title=f"{source.dataset} · {source.configuration}" if source.configuration else "Comparison",
        trainers=source.trainers,
        headlines=[_make_headline(tables, trainer, len(source.references)) for trainer in candidates],
        notes=[*_describe_limits(source, result.settings.metrics), *result.notes],
        tables=tables,
        extremes=[_find_extremes(table, trainer, reference) for trainer in candidates for table in tables],
        cases=_list_cases(tables[0], source.trainers),
        differing=_find_differing(result, tables[0]),
        methods=_describe_methods(result, [table.metric for table in tables]),
        facts=_list_facts(result),
    )


# numbers


def _make_table(result: Comparison, metric: Metric) -> MetricTable:
    rows = result.comparison[result.comparison["metric"] == metric.name].rename(columns={"class": "name"})
    measured = rows.select_dtypes("float").columns.difference(["p", "p_holm"])
    rows[measured] *= metric.factor
    for column in ("by_seed", "reference_by_seed"):
        rows[column] = [[metric.factor * value for value in values] for values in rows[column]]
    by_place = {(row.name, row.trainer): row for row in rows.itertuples(index=False)}
    labels, candidates = list(result.source.labels), result.source.trainers[1:]
    classes = [*labels, MEAN] if len(labels) > 1 else labels
    groups = {}
    for name in classes:
        own = [by_place[name, trainer] for trainer in candidates]
        first = _format_mean(own[0].reference_mean, own[0].reference_low, own[0].reference_high)
        reference = Row(own[0].reference, 0, *first)
        groups[name] = [reference, *(_make_row(row, number) for number, row in enumerate(own, 1))]
    largest = {name: max(abs(by_place[name, trainer].difference) for trainer in candidates) for name in labels}
    most = sorted(labels, key=lambda name: -largest[name])[:MOST_DRAWN]
    return MetricTable(
        metric,
        result.source.distance_unit if metric.is_distance else "points",
        groups,
        _by_case(result.scores, metric),
        by_place,
        [name for name in classes if name in most or name == MEAN],
    )


def _make_row(row: Any, number: int) -> Row:
    ends = [row.difference_low, row.difference_high]
    return Row(
        row.trainer,
        number,
        *_format_mean(row.mean, row.low, row.high),
        difference=signed(row.difference),
        interval="–" if np.isnan(ends).any() else f"{signed(ends[0])} to {signed(ends[1])}",
        p=format_p(row.p_holm),
        verdict=row.verdict,
        about=_name_networks(row) if row.verdict != "undecided" else "",
        counts=f"{row.wins}:{row.ties}:{row.losses}",
    )


def _format_mean(mean: float, low: float, high: float) -> tuple[str, str]:
    return f"{mean:.2f}", "–" if np.isnan([low, high]).any() else f"{low:.2f} to {high:.2f}"


def _name_networks(row: Any) -> str:
    """What was compared, where a trainer has a single training, so that nothing says how another one would differ."""
    numbers = len(row.by_seed), len(row.reference_by_seed)
    if min(numbers) > 1:
        return ""
    return "these two networks" if max(numbers) == 1 else "these networks"


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


def _by_case(scores: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Scores in the unit that is shown, seeds averaged: a row for each case, columns (class, trainer), mean last."""
    own = scores[scores["metric"] == metric.name]
    table = metric.factor * own.pivot_table(index="case", columns=["class", "trainer"], values="value", sort=False)
    means = table.T.groupby(level="trainer", sort=False).mean().T
    means.columns = pd.MultiIndex.from_product([[MEAN], means.columns], names=table.columns.names)
    return table.join(means)


def _find_extremes(table: MetricTable, trainer: str, reference: str) -> tuple[str, ...]:
    row, changes = table.rows[MEAN, trainer], table.subtract(trainer, reference)[MEAN]
    best, worst = ((case, f"{signed(changes[case])} {table.unit}") for case in (row.best, row.worst))
    return trainer, table.metric.name, *best, *worst


def _list_cases(table: MetricTable, trainers: list[str]) -> dict[str, list[str]]:
    means = table.values[MEAN][trainers]
    differences = means.sub(means[trainers[0]], axis=0)[trainers[1:]]
    order = differences[trainers[1]].sort_values(kind="stable").index
    return {case: [*(f"{v:.2f}" for v in means.loc[case]), *map(signed, differences.loc[case])] for case in order}


def _find_differing(result: Comparison, table: MetricTable) -> dict[str, dict[str, str]]:
    trainers = result.source.trainers
    means = _by_case(result.scores[result.scores["seed"] == 0], table.metric)[MEAN][trainers]
    largest = means.sub(means[trainers[0]], axis=0).abs().max(axis=1).sort_values(ascending=False, kind="stable")
    return {case: {name: f"{means.loc[case, name]:.1f}" for name in trainers} for case in largest.index[largest > 0]}


# sentences


def _make_headline(tables: list[MetricTable], trainer: str, cases: int) -> Headline:
    rows = [(table, table.rows[MEAN, trainer]) for table in tables]
    first, *others = (headline(row, cases, table.unit) for table, row in rows)
    table, row = rows[0]
    return Headline(row.verdict, bool(_name_networks(row)), first, _describe_seeds(row, table.unit), others)


def headline(row: Any, cases: int, unit: str) -> str:
    """What the means over classes say.

    Args:
        row: of a comparison, as an object, in the unit that is shown.
        cases: their number.
        unit: of the metric.
    """
    metric, difference = METRICS[row.metric], row.difference
    ends = [row.difference_low, row.difference_high]
    without_interval = bool(np.isnan(ends).any())
    # a bound of 0.03 must not be shown as 0.0
    digits = 1 if without_interval or min(map(abs, [difference, *ends])) >= 0.05 else 2
    count = f"{cases} cases" if cases > 1 else "a single case"
    if row.ties == cases:
        where = f"each of {count}" if cases > 1 else count
        return f"{row.trainer} and {row.reference} have the same mean {row.metric} in {where}."
    up, down = ("larger", "smaller") if metric.lower_is_better else ("higher", "lower")
    compared = (
        f"{row.trainer}'s mean {row.metric} over {count} is {abs(difference):.{digits}f} {unit} "
        f"{up if difference > 0 else down} than {row.reference}'s"
    )
    if without_interval:
        return f"{compared}; there is no interval, so it says nothing about other cases."
    if ends[0] <= 0 <= ends[1]:
        return (
            f"{row.trainer} and {row.reference}: no difference in mean {row.metric} that these {count} can show "
            f"({signed(difference, digits)} {unit}, 95 % interval {signed(ends[0], digits)} to "
            f"{signed(ends[1], digits)})."
        )
    direction = doubt = ""
    if metric.lower_is_better:
        direction = f", which is {'better' if difference < 0 else 'worse'}"
    if not row.p_holm < 0.05:
        doubt = f", but the test doesn't confirm it (p = {format_p(row.p_holm)})"
    elif row.verdict == "undecided":
        doubt = ", but other trainings may not show it"
    # one network of a trainer is no more than that
    networks = _name_networks(row)
    about = f"{networks.capitalize()}: " if networks else ""
    low, high = sorted(map(abs, ends))
    return f"{about}{compared}{direction} (95 % interval {low:.{digits}f} to {high:.{digits}f}){doubt}."


def _describe_seeds(row: Any, unit: str) -> str:
    """What is known of the variance between trainings."""
    if len(row.by_seed) == len(row.reference_by_seed) == 1:
        return (
            "One training each: how much trainings with other seeds would differ isn't known, and not in the interval."
        )
    trainings = {row.trainer: row.by_seed, row.reference: row.reference_by_seed}
    listed = ", ".join(f"{name} {' / '.join(f'{v:.1f}' for v in values)}" for name, values in trainings.items())
    sentence = f"Mean {row.metric} by seed, {unit}: {listed}"
    if np.isnan(row.seed_low):
        return f"{sentence}."
    over = "95 % interval of the difference over other trainings (Welch's t)"
    return f"{sentence}; {over}: {signed(row.seed_low, 1)} to {signed(row.seed_high, 1)}."


def _describe_limits(source: Source, metrics: Collection[str]) -> list[str]:
    """What a reader should know first: too few cases, and distances without a scale."""
    limits = []
    if source.distance_unit != "mm" and {"NSD", "HD95"} & set(metrics):
        limits.append(
            "These files have no scale, so that distances (HD95 and the tolerance of the NSD) are in "
            f"{source.distance_unit}, not in mm: their size depends on the resolution of the images."
        )
    cases = len(source.references)
    if 1 < cases < ENOUGH:
        limits.append(
            f"{cases} cases are few: an interval that stays within what was measured can contain the true mean in "
            f"{100 * largest_coverage(cases):.0f} of 100 studies at most, not in 95, and the test can't get below 0.05."
        )
    return limits


def _describe_methods(result: Comparison, metrics: list[Metric]) -> list[str]:
    """How the numbers were made and what they leave out, a paragraph each."""
    both = ", ".join(f"{metric.name} {0 if metric.is_distance else 100}" for metric in metrics)
    one = ", ".join(f"{m.name} {'the diagonal of the image' if m.is_distance else 0}" for m in metrics)
    scored = (
        f"{result.explain_metrics()} Shares are in points (0 to 100), distances in {result.source.distance_unit}. "
        f"Where reference and prediction are both empty, a class gets the best value ({both}); where only one is, "
        f"the worst ({one}). No case is dropped."
    )
    several = result.scores["seed"].nunique() > 1
    paired = (
        "Trainers are compared on the same cases. "
        + ("Each trainer's seeds are averaged within a case first. " if several else "")
        + "The difference is the mean over cases of candidate − reference; its interval is a 95 % bootstrap over cases "
        "(bias-corrected and accelerated, BCa; for few cases its quantiles are further out, as by Hesterberg)."
    )
    test = (
        "p is of a two-sided Wilcoxon signed-rank test on the paired differences, corrected by Holm for all classes "
        "and candidates of a metric (for the mean over classes: for all candidates). A verdict other than undecided "
        "needs the interval and this test to exclude no difference, and with several seeds Welch's t interval over "
        "trainings, too; with a single training it is about the networks that were compared, not about their trainers. "
        "Undecided doesn't mean equal. "
        "better:same:worse counts cases."
    )
    trainings = (
        "The means by seed show how much trainings vary, but that is not in the interval."
        if several
        else "With one training each, the variance between trainings is left out: it can exceed the difference."
    )
    left_out = (
        f"The interval is about other cases of the same kind, not about other trainings. {trainings} "
        "Cases of one patient count as if they were independent."
    )
    return [scored, paired, test, left_out]


def _list_facts(result: Comparison) -> dict[str, str]:
    source, information = result.source, result.information
    seeds = result.scores.groupby("trainer")["seed"].nunique()
    times = information["epoch_seconds"]
    facts = {
        "dataset" if source.configuration else "references": source.dataset,
        "configuration": source.configuration or "",
        "folds": ", ".join(source.folds),
        "labels": source.label_source,
        "cases": str(len(source.references)),
        "classes": ", ".join(source.labels),
        "trainings": ", ".join(f"{name} {seeds[name]}" for name in source.trainers),
        "seconds an epoch": ", ".join(f"{name} {times[name]:.1f}" for name in source.trainers if times.get(name)),
        "versions": ", ".join(f"{name} {number}" for name, number in information["versions"].items()),
        "date": information["date"],
        **{f"seeds of {t}" if len(own) > 1 else t: ", ".join(own) for t, own in information["folders"].items()},
    }
    return {name: value for name, value in facts.items() if value}
