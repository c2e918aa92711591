"""The sentences of a report: what was found, how sure it is, and how it was computed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nnunet_lomix.compare.metrics import METRICS
from nnunet_lomix.compare.statistics import (
    ENOUGH,
    excludes_zero,
    interval_over_trainings,
    is_about_networks,
    is_better,
    is_confirmed,
    largest_coverage,
    trainings_agree,
)
from nnunet_lomix.compare.tables import format_p, name_networks, signed


def headline(row: Mapping[str, Any], cases: int, unit: str) -> str:
    """What the means over classes say.

    Args:
        row: of a comparison, in the units that are shown.
        cases: their number.
        unit: of the metric.
    """
    metric, difference = METRICS[row["metric"]], row["difference"]
    ends = [row["difference_low"], row["difference_high"]]
    without_interval = bool(np.isnan(ends).any())
    # a bound of 0.03 must not be shown as 0.0
    digits = 1 if without_interval or min(map(abs, [difference, *ends])) >= 0.05 else 2
    count = f"{cases} cases" if cases > 1 else "a single case"
    if row["ties"] == cases:
        where = f"each of {count}" if cases > 1 else count
        return f"{row['trainer']} and {row['reference']} have the same mean {row['metric']} in {where}."
    up, down = ("larger", "smaller") if metric.lower_is_better else ("higher", "lower")
    compared = (
        f"{row['trainer']}'s mean {row['metric']} over {count} is {abs(difference):.{digits}f} {unit} "
        f"{up if difference > 0 else down} than {row['reference']}'s"
    )
    if without_interval:
        return f"{compared}; there is no interval, so it says nothing about other cases."
    if not excludes_zero(row):
        return (
            f"{row['trainer']} and {row['reference']}: no difference in mean {row['metric']} that these {count} can "
            f"show ({signed(difference, digits)} {unit}, 95 % interval {signed(ends[0], digits)} to "
            f"{signed(ends[1], digits)})."
        )
    direction = ""
    if metric.lower_is_better:
        direction = f", which is {'better' if is_better(row) else 'worse'}"
    doubt = ""
    if not is_confirmed(row):
        doubt = f", but the test doesn't confirm it (p = {format_p(row['p_holm'])})"
    elif not trainings_agree(row):
        doubt = ", but other trainings may not show it"
    # one network of a trainer is no more than that
    about = f"{name_networks(row)}: ".capitalize() if is_about_networks(row) else ""
    low, high = sorted(map(abs, ends))
    return f"{about}{compared}{direction} (95 % interval {low:.{digits}f} to {high:.{digits}f}){doubt}."


def describe_seeds(row: Mapping[str, Any], unit: str) -> str:
    """What is known of the variance between trainings; arguments as for :func:`headline`."""
    if len(row["by_seed"]) == len(row["reference_by_seed"]) == 1:
        return (
            "One training each: how much trainings with other seeds would differ isn't known, and not in the interval."
        )
    trainings = {row["trainer"]: row["by_seed"], row["reference"]: row["reference_by_seed"]}
    listed = ", ".join(f"{name} {' / '.join(f'{v:.1f}' for v in values)}" for name, values in trainings.items())
    sentence = f"Mean {row['metric']} by seed, {unit}: {listed}"
    low, high = interval_over_trainings(row)
    if np.isnan(low):
        return f"{sentence}."
    over = "95 % interval of the difference over other trainings (Welch's t)"
    return f"{sentence}; {over}: {signed(low, 1)} to {signed(high, 1)}."


def describe_limits(cases: int, distance: str) -> list[str]:
    """What a reader should know first: too few cases, and distances without a scale.

    Args:
        cases: their number.
        distance: the unit of distances, ``mm`` or ``pixels``.
    """
    limits = []
    if distance != "mm":
        limits.append(
            f"These files have no scale, so that HD95 and the tolerance of the NSD are in {distance}, not in mm: their "
            "size depends on the resolution of the images."
        )
    if 1 < cases < ENOUGH:
        limits.append(
            f"{cases} cases are few: an interval that stays within what was measured can contain the true mean in "
            f"{100 * largest_coverage(cases):.0f} of 100 studies at most, not in 95, and the test can't get below 0.05."
        )
    return limits


def describe_methods(
    scores: pd.DataFrame, metrics: Sequence[str], information: Mapping[str, Any], distance: str
) -> list[str]:
    """How the numbers were made and what they leave out, a paragraph each; ``distance`` is the unit of distances."""
    tolerance = information.get(f"tolerance_{distance}")
    implementation = information.get("metrics")
    scored = (
        f"Dice, NSD and IoU are in points (0 to 100), HD95 in {distance}. Where reference and prediction are both "
        "empty, a class gets the best value (Dice, NSD and IoU 100, HD95 0); where only one is, the worst (Dice, NSD "
        "and IoU 0, HD95 the diagonal of the image). No case is dropped."
    )
    if "NSD" in metrics and tolerance is not None:
        unit = distance.removesuffix("s") if tolerance == 1 else distance
        scored += f" NSD counts a piece of surface as right within {tolerance:g} {unit}."
    if implementation:
        scored += f" Implementation of the metrics: {implementation}."
    several = scores["seed"].nunique() > 1
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
