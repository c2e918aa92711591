"""Paired comparison of trainers over cases: means, intervals, tests, and the verdict."""

import warnings
from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from scipy import stats

from nnunet_lomix.compare.metrics import METRICS, Metric
from nnunet_lomix.compare.sources import MEAN

# with fewer cases neither the interval can have 95 % nor can the test of signed ranks get below 0.05
ENOUGH = 6

# values that differ by less are equal: averages over seeds and classes are rounded
_DECIMALS = 12
# numbers that one batch of resamples may hold: 32 MB
_BATCH = 4_000_000
# up to so many differences all signs are tried, which is exact with tied ranks, too; SciPy takes seconds for it
_ENUMERATED = 13


def compare_trainers(
    scores: pd.DataFrame, trainers: Sequence[str] | None = None, resamples: int = 9999
) -> pd.DataFrame:
    """Compare every trainer with the first one, in each metric and class and in the mean over classes of each case.

    Seeds are averaged within each case first, so that a case counts once: intervals and tests are about other cases.
    How much another training would differ is not in them; ``by_seed``, ``seed_low`` and ``seed_high`` show it.

    Args:
        scores: columns ``case``, ``class``, ``trainer``, ``seed``, ``metric`` and ``value``; in each metric one value
            for every case, class, trainer and seed.
        trainers: their order, the reference first; by default as they appear.
        resamples: of the bootstrap.

    Returns:
        A row for each metric, class (the last one is "mean") and candidate, with columns

        - ``metric``, ``class``, ``trainer``, ``reference``: names.
        - ``mean``, ``low``, ``high``: the candidate's mean over cases with its 95 % interval of :func:`bootstrap_mean`;
          likewise ``reference_mean``, ``reference_low`` and ``reference_high``.
        - ``difference``, ``difference_low``, ``difference_high``: candidate − reference, paired by case.
        - ``p``: Wilcoxon's signed-rank test of these differences, two-sided, zeros left out. ``p_holm``: corrected for
          all classes and candidates of the metric; in rows "mean" for the candidates.
        - ``wins``, ``ties``, ``losses``: in how many cases the candidate is better (a lower HD95), equal, worse.
        - ``worst``, ``best``: the case in which it loses, gains most.
        - ``by_seed``, ``reference_by_seed``: the mean of each training, by seed; equal seeds are no pairs.
        - ``seed_low``, ``seed_high``: the 95 % interval of the difference over trainings, of :func:`welch_interval`.
        - ``verdict``: ``better`` or ``worse`` if the interval over cases, the corrected test (``p_holm`` < 0.05) and
          the interval over trainings, where there is one, exclude no difference; else ``undecided``.

        Intervals over cases are NaN if there is one case, and the point if all its values are equal.

    Raises:
        ValueError: there are fewer than two trainers, or a score is missing or there twice.
    """
    trainers = list(scores["trainer"].unique()) if trainers is None else list(trainers)
    if len(trainers) < 2:
        raise ValueError(f"A comparison needs two trainers, not {trainers}.")
    tables = [
        _compare_in(METRICS[name], own, trainers, resamples) for name, own in scores.groupby("metric", sort=False)
    ]
    comparison = pd.concat(tables, ignore_index=True)
    family = [comparison["metric"], comparison["class"] == MEAN]
    comparison.insert(comparison.columns.get_loc("p") + 1, "p_holm", comparison.groupby(family)["p"].transform(holm))
    return comparison.assign(verdict=_judge(comparison))


def _judge(comparison: pd.DataFrame) -> np.ndarray:
    over_cases = (comparison["difference_low"] > 0) | (comparison["difference_high"] < 0)
    # NaN, without an interval: a single training can't disagree
    over_trainings = ~((comparison["seed_low"] <= 0) & (comparison["seed_high"] >= 0))
    decided = over_cases & over_trainings & (comparison["p_holm"] < 0.05)
    lower_is_better = comparison["metric"].map(lambda name: METRICS[name].lower_is_better)
    better = (comparison["difference"] > 0) != lower_is_better
    return np.where(decided, np.where(better, "better", "worse"), "undecided")


def _compare_in(metric: Metric, scores: pd.DataFrame, trainers: list[str], resamples: int) -> pd.DataFrame:
    cases = sorted(scores["case"].unique())
    classes = list(scores["class"].unique())
    by_seed = [_tabulate(scores[scores["trainer"] == trainer], cases, classes) for trainer in trainers]
    values = np.stack([v.mean(axis=0) for v in by_seed])
    # the same cases are drawn for all trainers and classes
    low, high = bootstrap_mean(values, resamples)
    differences = np.round(values - values[0], _DECIMALS)
    gains = -differences if metric.lower_is_better else differences
    difference_low, difference_high = bootstrap_mean(differences, resamples)
    rows = []
    for c, name in enumerate([*classes, MEAN]):
        for t, trainer in enumerate(trainers[1:], start=1):
            own_trainings, reference_trainings = (by_seed[i][:, c].mean(axis=1).tolist() for i in (t, 0))
            largest = np.inf if metric.is_distance else 1
            seed_low, seed_high = welch_interval(own_trainings, reference_trainings, largest)
            rows.append(
                {
                    "metric": metric.name,
                    "class": name,
                    "trainer": trainer,
                    "reference": trainers[0],
                    "mean": values[t, c].mean(),
                    "low": low[t, c],
                    "high": high[t, c],
                    "reference_mean": values[0, c].mean(),
                    "reference_low": low[0, c],
                    "reference_high": high[0, c],
                    "difference": differences[t, c].mean(),
                    "difference_low": difference_low[t, c],
                    "difference_high": difference_high[t, c],
                    "p": signed_rank(differences[t, c]),
                    "wins": int((gains[t, c] > 0).sum()),
                    "ties": int((gains[t, c] == 0).sum()),
                    "losses": int((gains[t, c] < 0).sum()),
                    "worst": cases[gains[t, c].argmin()],
                    "best": cases[gains[t, c].argmax()],
                    "by_seed": own_trainings,
                    "reference_by_seed": reference_trainings,
                    "seed_low": seed_low,
                    "seed_high": seed_high,
                }
            )
    return pd.DataFrame(rows)


def _tabulate(scores: pd.DataFrame, cases: list[str], classes: list[str]) -> np.ndarray:
    """One trainer's scores in one metric, (seeds, classes + 1, cases); the last class is the mean over the others."""
    table = scores.pivot(index=["seed", "class"], columns="case", values="value")
    seeds = sorted(scores["seed"].unique())
    wanted = pd.MultiIndex.from_product([seeds, classes])
    values = table.reindex(index=wanted, columns=cases).to_numpy().reshape(len(seeds), len(classes), len(cases))
    if not values.size or np.isnan(values).any():
        raise ValueError("Every case, class, trainer and seed needs a score in every metric.")
    return np.concatenate([values, values.mean(axis=1, keepdims=True)], axis=1)


def bootstrap_mean(values: np.ndarray, resamples: int = 9999) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean over the last axis: bootstrap, bias-corrected and accelerated (BCa), expanded.

    The same numbers give the same interval, and the same draws are used for all rows. A bootstrap is too narrow for few
    cases: its variance is σ² (n − 1) / n of theirs, and it knows no Student's t. So the ends are quantiles further out,
    at the level Φ(−t √(n / (n − 1))) instead of 2.5 %: 1.6 % for 20 cases, 2.1 % for 50. This is the expanded
    percentile interval of Hesterberg (2015), What Teachers Should Know about the Bootstrap, The American Statistician
    69(4), for BCa as in ``CI.bca`` of his R package resample. Both ends are means of resamples, so they stay within
    the values: none of a bounded score is impossible. For fewer than :data:`ENOUGH` cases this is a limit, too: see
    :func:`largest_coverage`.

    Args:
        values: (..., n).
        resamples: number of bootstrap samples.

    Returns:
        Lower and upper ends, (...); NaN if n is 1, the mean where all n values are equal.
    """
    flat = values.reshape(-1, values.shape[-1])
    n = flat.shape[1]
    low = flat.mean(axis=1)
    high = low.copy()
    spread = np.ptp(flat, axis=1) > 10.0**-_DECIMALS
    if n == 1:
        low[:] = high[:] = np.nan
    elif spread.any():
        expanded = stats.norm.cdf(stats.t.ppf(0.025, n - 1) * np.sqrt(n / (n - 1)))
        result = stats.bootstrap(
            (flat[spread],),
            np.mean,
            axis=-1,
            vectorized=True,
            method="BCa",
            # a level of 1, to which two cases come, is beyond BCa's formula; no resample is as far out as this
            confidence_level=1 - 2 * max(expanded, 1e-12),
            n_resamples=resamples,
            batch=max(1, _BATCH // flat[spread].size),
            rng=np.random.default_rng(0),
        )
        low[spread], high[spread] = result.confidence_interval
    return low.reshape(values.shape[:-1]), high.reshape(values.shape[:-1])


def largest_coverage(cases: int) -> float:
    """How often, at most, an interval within the values of so many cases contains the true mean.

    A value lies below the mean with some probability p, so all n lie on one side of it with p^n + (1 − p)^n, which is
    2^(1 − n) at least.

    >>> largest_coverage(4), largest_coverage(ENOUGH) > 0.95
    (0.875, True)
    """
    return 1 - 2.0 ** (1 - cases)


def signed_rank(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; zeros are left out, and if there is nothing else it is 1.

    >>> signed_rank(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))  # one of 2**5 signs, or its mirror image
    0.0625
    """
    differences = differences[differences != 0]
    if len(differences) > _ENUMERATED:
        return float(stats.wilcoxon(differences).pvalue)
    ranks = stats.rankdata(np.abs(differences))
    signs = np.array(list(product((-1, 1), repeat=len(ranks))))
    return float(np.mean(np.abs(signs @ ranks) >= abs(np.sign(differences) @ ranks)))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction: the k-th smallest of m values times m − k + 1, never less than those before.

    Of the libraries that this package depends on none has it: SciPy corrects the false discovery rate only.

    >>> holm([0.01, 0.04, 0.03])
    array([0.03, 0.06, 0.06])
    """
    values = np.asarray(p, dtype=float)
    order = values.argsort()
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return corrected


def welch_interval(
    candidate: Sequence[float], reference: Sequence[float], largest: float = np.inf
) -> tuple[float, float]:
    """Welch's 95 % interval of the difference of two means over trainings.

    Trainings are no pairs: nothing but their order would say which seed of the candidate belongs to which. With two or
    three of them Student's t is so wide that the interval of a bounded score would leave what is possible. So it is
    taken on the scale of artanh(difference / largest), which has no ends, with the standard error by the delta method,
    as Fisher did for correlations (z transformation).

    Args:
        candidate, reference: the mean of each training.
        largest: value of the score; the smallest is 0.

    Returns:
        Both ends; NaN if one of them has a single training, the difference if neither varies.
    """
    if min(len(candidate), len(reference)) < 2:
        return np.nan, np.nan
    difference = float(np.mean(candidate) - np.mean(reference))
    if np.ptp(candidate) == np.ptp(reference) == 0:
        return difference, difference
    with warnings.catch_warnings():
        # SciPy warns if the trainings of one trainer are equal, which is right here
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        low, high = stats.ttest_ind(candidate, reference, equal_var=False).confidence_interval()
    if np.isinf(largest):
        return float(low), float(high)
    half = (high - low) / 2 / (largest - difference**2 / largest)  # the slope of artanh(d / l) is 1 / (l − d² / l)
    low, high = largest * np.tanh(np.arctanh(difference / largest) + np.array([-half, half]))
    return float(low), float(high)
