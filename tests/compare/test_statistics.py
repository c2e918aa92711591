"""Coverage of intervals and error rates of tests on simulated cases; tables against plain loops."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from nnunet_lomix.compare.statistics import (
    ENOUGH,
    bootstrap_mean,
    compare_trainers,
    holm,
    largest_coverage,
    signed_rank,
    welch_interval,
)
from tests.compare import made_up
from tests.compare.made_up import to_scores

METRICS = ("Dice", "NSD", "HD95")


def make_scores(cases=12, trainers=("old", "new", "other"), seeds=2, random=0) -> pd.DataFrame:
    return made_up.make_scores([f"case_{i}" for i in range(cases)], "ab", trainers, seeds, METRICS, random)


def skewed(rng: np.random.Generator, shape) -> np.ndarray:
    """Mean 0, skewness 1.15: a gamma distribution of shape 3."""
    return rng.gamma(3, size=shape) - 3


@pytest.mark.parametrize("n", [30, 40, 50])
def test_intervals_cover_the_true_mean(n):
    """2000 simulated studies; 95 % ± 2 %. BCa as it is covers less with 30 cases."""
    low, high = bootstrap_mean(skewed(np.random.default_rng(n), (2000, n)), resamples=1000)
    covered = np.mean((low <= 0) & (high >= 0))
    assert abs(covered - 0.95) <= 0.02, covered


def test_intervals_are_bca_at_a_level_expanded_by_students_t():
    """BCa from its formula (Efron and Tibshirani 1993, 14.3), with draws of its own."""
    values = skewed(np.random.default_rng(1), 25)
    n, mean = len(values), values.mean()
    resamples = values[np.random.default_rng(99).integers(0, n, (100_000, n))].mean(axis=1)
    bias = stats.norm.ppf(np.mean(resamples < mean))
    jackknife = (values.sum() - values) / (n - 1)
    deviations = jackknife.mean() - jackknife
    acceleration = np.sum(deviations**3) / (6 * np.sum(deviations**2) ** 1.5)
    # where Student's interval with the standard deviation of the cases ends, in standard deviations of a bootstrap
    z = stats.t.interval(0.95, n - 1)[1] * np.std(values, ddof=1) / np.std(values)
    ends = [bias + (bias + end) / (1 - acceleration * (bias + end)) for end in (-z, z)]
    expected = np.quantile(resamples, stats.norm.cdf(ends))
    (low,), (high,) = bootstrap_mean(values[None], resamples=100_000)
    assert [low, high] == pytest.approx(expected, abs=0.015)
    assert high - mean > mean - low
    narrow = stats.bootstrap((values,), np.mean, n_resamples=100_000, rng=np.random.default_rng(99)).confidence_interval
    assert low < narrow.low - 0.015 and high > narrow.high + 0.015


SCORES = st.lists(st.integers(0, 8).map(lambda eighths: eighths / 8), min_size=2, max_size=9)


@settings(max_examples=100)
@given(SCORES)
@example([1.0, 1.0, 1.0, 0.75])  # Dice; −0.07 of the upper end is no Dice
@example([0.0, 0.0, 0.0, 4.0])  # HD95; −0.87 mm is no distance
@example([0.5, 1.0])
def test_intervals_stay_within_what_was_measured(values):
    (low,), (high,) = bootstrap_mean(np.array([values]), resamples=999)
    assert min(values) <= low <= np.mean(values) <= high <= max(values)


@pytest.mark.parametrize("n, at_most", [(4, 0.875), (5, 0.9375)])
def test_few_cases_cannot_have_a_sure_interval(n, at_most):
    """2000 simulated studies. What is known of the limit is said in the report: test_findings.py."""
    low, high = bootstrap_mean(np.random.default_rng(n).standard_normal((2000, n)), resamples=1000)
    covered = np.mean((low <= 0) & (high >= 0))
    assert largest_coverage(n) == at_most and at_most - 0.05 <= covered <= at_most + 0.02, covered
    # the smallest p that the test can give: all differences of one sign
    assert signed_rank(np.arange(1.0, n + 1)) > 0.05 and n < ENOUGH
    assert signed_rank(np.arange(1.0, ENOUGH + 1)) < 0.05 and largest_coverage(ENOUGH) > 0.95


@settings(max_examples=100)
@given(
    st.lists(st.floats(0, 100), min_size=2, max_size=5),
    st.lists(st.floats(0, 100), min_size=2, max_size=5),
)
@example([50.0, 70.0], [50.0, 50.0])  # −117 to +137 points
def test_intervals_over_trainings_stay_possible(candidate, reference):
    low, high = welch_interval(candidate, reference, largest=100)
    assert -100 <= low <= np.mean(candidate) - np.mean(reference) + 1e-9 and low - 1e-9 <= high <= 100


def test_intervals_over_trainings_of_small_differences_are_welchs():
    """Where the bounds are far away, they change nothing."""
    candidate, reference = [81.1, 83.0, 85.1], [80.0, 82.0, 84.0]
    plain = stats.ttest_ind(candidate, reference, equal_var=False).confidence_interval()
    assert welch_interval(candidate, reference) == pytest.approx(plain)
    assert welch_interval(candidate, reference, largest=100) == pytest.approx(plain, abs=0.01)
    back = welch_interval(reference, candidate, largest=100)
    assert welch_interval(candidate, reference, largest=100) == pytest.approx((-back[1], -back[0]))


def test_family_of_classes_rarely_finds_a_difference_where_there_is_none():
    """Of 8 classes any is found falsely in a third of all studies; Holm keeps that at 5 %."""
    p = np.random.default_rng(6).uniform(size=(2000, 8))
    assert np.mean((p <= 0.05).any(axis=1)) > 0.3
    assert np.mean([(holm(row) <= 0.05).any() for row in p]) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 2000)


def test_signed_rank_by_hand():
    # of 2**4 signs, those with a sum of positive ranks of 0, 1, 9 or 10 are at least as extreme as −1, 2, 3, 4
    assert signed_rank(np.array([-1.0, 2.0, 3.0, 4.0])) == pytest.approx(4 / 16)
    assert signed_rank(np.array([-1.0, 0.0, 2.0, 3.0, 0.0, 4.0])) == pytest.approx(4 / 16)
    assert signed_rank(np.zeros(5)) == 1
    assert signed_rank(np.array([3.0])) == 1


@settings(max_examples=30)
@given(st.lists(st.integers(-3, 3).filter(bool), min_size=2, max_size=6))
def test_signed_rank_is_exact_with_ties(differences):
    theirs = stats.wilcoxon(differences, method=stats.PermutationMethod())
    assert signed_rank(np.array(differences, float)) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_signed_rank_of_many_cases():
    differences = np.random.default_rng(8).integers(-20, 25, 60)
    theirs = stats.wilcoxon(differences[differences != 0])
    assert signed_rank(differences) == pytest.approx(theirs.pvalue)


def test_holm_by_hand():
    # sorted: 0.005 · 4, 0.01 · 3, 0.03 · 2, 0.04 · 1, which is less than the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert holm([0.02]) == pytest.approx([0.02])


def test_table_equals_plain_loops():
    """In whatever order the scores are."""
    scores = make_scores().sample(frac=1, random_state=0)
    table = compare_trainers(scores, ["old", "new", "other"], resamples=99)
    assert set(table["class"]) == {"a", "b", "mean"} and table["class"].iloc[-1] == "mean"
    assert len(table) == 3 * 3 * 2 and set(table["reference"]) == {"old"}
    values = {tuple(row[:-1]): row[-1] for row in scores.itertuples(index=False)}
    cases = sorted(set(scores["case"]))

    def average(case, name, trainer, metric, seeds=(0, 1)):
        classes = ("a", "b") if name == "mean" else (name,)
        return np.mean([values[case, c, trainer, seed, metric] for c in classes for seed in seeds])

    for row in table.itertuples():
        metric, name = row.metric, row[table.columns.get_loc("class") + 1]
        new, old = ([average(case, name, t, metric) for case in cases] for t in (row.trainer, "old"))
        gains = np.subtract(old, new) if metric == "HD95" else np.subtract(new, old)
        assert row.mean == pytest.approx(np.mean(new)) and row.reference_mean == pytest.approx(np.mean(old))
        assert row.difference == pytest.approx(np.mean(new) - np.mean(old))
        # a difference is paired: its interval is of no difference of intervals
        samples = {"": new, "reference_": old, "difference_": np.subtract(new, old)}
        for column, sample in samples.items():
            ends = getattr(row, f"{column}low"), getattr(row, f"{column}high")
            assert ends == pytest.approx(np.concatenate(bootstrap_mean(np.array([sample]), 99)), abs=1e-9)
        assert (row.wins, row.ties, row.losses) == (sum(gains > 0), sum(gains == 0), sum(gains < 0))
        assert (row.worst, row.best) == (cases[np.argmin(gains)], cases[np.argmax(gains)])
        assert row.p == pytest.approx(stats.wilcoxon(new, old).pvalue)
        for trainer, means in ((row.trainer, row.by_seed), ("old", row.reference_by_seed)):
            expected = [np.mean([average(case, name, trainer, metric, [seed]) for case in cases]) for seed in (0, 1)]
            assert means == pytest.approx(expected)


def test_families_of_holm():
    table = compare_trainers(make_scores(random=3), resamples=99)
    for metric in METRICS:
        own = table[table["metric"] == metric]
        for rows in (own[own["class"] != "mean"], own[own["class"] == "mean"]):
            assert len(rows) in (4, 2)
            assert rows["p_holm"].to_numpy() == pytest.approx(holm(rows["p"]))


def test_a_single_case_has_no_interval():
    table = compare_trainers(make_scores(cases=1, seeds=1), resamples=99)
    assert table[["low", "high", "difference_low", "difference_high", "reference_low"]].isna().all(axis=None)
    assert table["difference"].notna().all() and (table["p"] == 1).all()
    assert (table["worst"] == "case_0").all() and all(len(seeds) == 1 for seeds in table["by_seed"])


@pytest.mark.parametrize("shift", [0.0, 0.125])
def test_equal_differences_have_a_point_as_interval(shift):
    scores = make_scores(trainers=("old",))
    new = scores.assign(trainer="new", value=scores["value"] + shift)
    table = compare_trainers(pd.concat([scores, new]), resamples=99)
    for column in ("difference", "difference_low", "difference_high"):
        assert table[column].to_numpy() == pytest.approx(shift, abs=1e-12)
    assert (table["p"] == 1).all() == (shift == 0)
    assert (table["ties"] == (0 if shift else 12)).all()
    assert table["low"].notna().all()


def test_rounding_is_no_difference():
    """0.1 + 0.2 is not 0.3: seeds in another order are a tie."""
    values = {"old": (0.1, 0.2, 0.3), "new": (0.3, 0.2, 0.1)}
    rows = [("x", "a", trainer, seed, "Dice", v) for trainer, own in values.items() for seed, v in enumerate(own)]
    table = compare_trainers(to_scores(rows), resamples=99)
    assert (table["ties"] == 1).all() and (table["p"] == 1).all()


@pytest.mark.parametrize(
    "damage", [lambda s: s[1:], lambda s: pd.concat([s, s[:1]]), lambda s: s[s["trainer"] == "old"]]
)
def test_refuses_missing_and_double_scores(damage):
    with pytest.raises(ValueError):
        compare_trainers(damage(make_scores()), resamples=99)


def shifted(shift, cases=12, metric="Dice", trainings=(1, 1), wobble=0.0, outlier=0.0) -> pd.Series:
    """The comparison of one class in which all cases differ by about ``shift``, the candidate's trainings by more.

    One of the cases differs by ``outlier`` beside that.
    """
    rng = np.random.default_rng(0)
    old = rng.uniform(0.3, 0.6, cases)
    changes = shift * rng.uniform(0.8, 1.2, cases)
    changes[0] += outlier
    rows = [
        (f"case_{i}", "a", trainer, seed, metric, old[i] + (trainer == "new") * (changes[i] + seed * wobble))
        for trainer, number in zip(("old", "new"), trainings, strict=True)
        for seed in range(number)
        for i in range(cases)
    ]
    return compare_trainers(to_scores(rows), resamples=499).iloc[0]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"shift": 0.05}, "better"),
        ({"shift": -0.05}, "worse"),
        ({"shift": 0.05, "metric": "HD95"}, "worse"),
        ({"shift": -0.05, "metric": "HD95"}, "better"),
        ({"shift": 0.0}, "undecided"),
        ({"shift": 0.05, "cases": 5}, "undecided"),  # the test can't get below 0.05
        ({"shift": 0.05, "cases": 1}, "undecided"),  # no interval
        ({"shift": 0.05, "outlier": -0.3}, "undecided"),  # the test is sure, but not the interval of the mean
        ({"shift": 0.05, "trainings": (2, 2), "wobble": 0.001}, "better"),
        ({"shift": 0.05, "trainings": (2, 2), "wobble": 0.1}, "undecided"),  # the trainings don't agree
        ({"shift": 0.05, "trainings": (1, 2), "wobble": 0.1}, "better"),  # a single training can't disagree
    ],
)
def test_verdicts(options, expected):
    row = shifted(**options)
    assert row["verdict"] == expected
    if min(options.get("trainings", (1, 1))) > 1:
        ends = welch_interval(row["by_seed"], row["reference_by_seed"], 1)
        assert (row["seed_low"], row["seed_high"]) == pytest.approx(ends)
    else:
        assert np.isnan([row["seed_low"], row["seed_high"]]).all()


def test_interval_of_trainings_without_variance_or_company():
    assert welch_interval([2.0, 2.0], [1.0, 1.0, 1.0]) == (1, 1)
    assert np.isnan(welch_interval([2.0, 2.0], [1.0])).all()
