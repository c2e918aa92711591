"""Coverage of intervals and error rates of tests on simulated cases; tables against plain loops."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nnunet_lomix.compare.statistics import bootstrap_mean, compare_trainers, holm, signed_rank

METRICS = ("Dice", "NSD", "HD95")


def make_scores(cases=12, classes=("a", "b"), trainers=("old", "new", "other"), seeds=2, random=0) -> pd.DataFrame:
    rng = np.random.default_rng(random)
    rows = [
        (f"case_{i}", name, trainer, seed, metric, rng.uniform() * (30 if metric == "HD95" else 1))
        for metric in METRICS
        for i in range(cases)
        for name in classes
        for trainer in trainers
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["case", "class", "trainer", "seed", "metric", "value"])


def skewed(rng: np.random.Generator, shape) -> np.ndarray:
    """Mean 0, skewness 1.15: a gamma distribution of shape 3."""
    return rng.gamma(3, size=shape) - 3


@pytest.mark.parametrize("n", [30, 40, 50])
def test_intervals_cover_the_true_mean(n):
    """2000 simulated studies; 95 % ± 2 %. BCa as it is covers less with 30 cases."""
    low, high = bootstrap_mean(skewed(np.random.default_rng(n), (2000, n)), resamples=1000)
    covered = np.mean((low <= 0) & (high >= 0))
    assert abs(covered - 0.95) <= 0.02, covered


def test_intervals_are_those_of_scipy_expanded_and_follow_the_skew():
    values = skewed(np.random.default_rng(1), 25)
    (low,), (high,) = bootstrap_mean(values[None], resamples=5000)
    theirs = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=5000, rng=np.random.default_rng(99))
    # as Student's interval with the standard deviation of the cases is to the normal one with that of a bootstrap
    expansion = stats.t.interval(0.95, 24)[1] / stats.norm.interval(0.95)[1] * np.std(values, ddof=1) / np.std(values)
    expected = values.mean() + expansion * (np.array(theirs.confidence_interval) - values.mean())
    assert [low, high] == pytest.approx(expected, abs=0.06)
    assert high - values.mean() > values.mean() - low


@pytest.mark.parametrize("null", [np.random.Generator.standard_normal, lambda rng, n: rng.laplace(size=n) ** 3])
def test_rarely_finds_a_difference_where_there_is_none(null):
    """1000 simulated studies without a difference; 5 % + two standard errors."""
    rng = np.random.default_rng(5)
    found = np.mean([signed_rank(null(rng, 20)) <= 0.05 for _ in range(1000)])
    assert found <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 1000), found


def test_family_of_classes_rarely_finds_a_difference_where_there_is_none():
    """Of 8 classes any is found falsely in a third of all studies; Holm keeps that at 5 %."""
    rng = np.random.default_rng(6)
    p = np.array([[signed_rank(rng.standard_normal(20)) for _ in range(8)] for _ in range(400)])
    assert np.mean((p <= 0.05).any(axis=1)) > 0.2
    assert np.mean([(holm(row) <= 0.05).any() for row in p]) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_finds_a_difference_where_there_is_one():
    rng = np.random.default_rng(7)
    assert np.mean([signed_rank(rng.standard_normal(20) + 1) <= 0.05 for _ in range(200)]) > 0.9


def test_signed_rank_by_hand():
    # of 2**4 signs, those with a sum of positive ranks of 0, 1, 9 or 10 are at least as extreme as −1, 2, 3, 4
    assert signed_rank(np.array([-1.0, 2.0, 3.0, 4.0])) == pytest.approx(4 / 16)
    assert signed_rank(np.array([-1.0, 0.0, 2.0, 3.0, 0.0, 4.0])) == pytest.approx(4 / 16)
    assert signed_rank(np.zeros(5)) == 1
    assert signed_rank(np.array([3.0])) == 1


@settings(max_examples=30, deadline=None)
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
    scores = make_scores()
    table = compare_trainers(scores, resamples=99)
    assert list(table["class"].unique()) == ["a", "b", "mean"]
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
        assert row.low < row.mean < row.high and row.reference_low < row.reference_mean < row.reference_high
        assert row.difference_low < row.difference < row.difference_high
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


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_order_of_rows_does_not_matter(random, cases):
    scores = make_scores(cases, random=random)
    shuffled = scores.sample(frac=1, random_state=random)
    order = ["metric", "class", "trainer"]
    trainers = ["old", "new", "other"]
    tables = [compare_trainers(s, trainers, 99).sort_values(order, ignore_index=True) for s in (scores, shuffled)]
    # sums over classes in another order are rounded otherwise
    pd.testing.assert_frame_equal(*tables, rtol=1e-9)


def test_exchanging_trainers_flips_signs():
    scores = make_scores(trainers=("old", "new"), random=2)
    there, back = (compare_trainers(scores, order, 499) for order in (["old", "new"], ["new", "old"]))
    for a, b in (("difference", "difference"), ("difference_low", "difference_high")):
        assert there[a].to_numpy() == pytest.approx(-back[b].to_numpy(), abs=1e-12)
    for a, b in (
        ("mean", "reference_mean"),
        ("low", "reference_low"),
        ("wins", "losses"),
        ("p", "p"),
        ("p_holm", "p_holm"),
    ):
        assert there[a].to_numpy() == pytest.approx(back[b].to_numpy())
    assert list(there["worst"]) == list(back["best"])
    assert list(back["by_seed"]) == [pytest.approx(seeds) for seeds in there["reference_by_seed"]]


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
    rows = [
        ("x", "a", t, s, "Dice", v)
        for t, vs in (("old", (0.1, 0.2, 0.3)), ("new", (0.3, 0.2, 0.1)))
        for s, v in enumerate(vs)
    ]
    scores = pd.DataFrame(rows, columns=["case", "class", "trainer", "seed", "metric", "value"])
    table = compare_trainers(scores, resamples=99)
    assert (table["ties"] == 1).all() and (table["p"] == 1).all()


@pytest.mark.parametrize(
    "damage", [lambda s: s[1:], lambda s: pd.concat([s, s[:1]]), lambda s: s[s["trainer"] == "old"]]
)
def test_refuses_missing_and_double_scores(damage):
    with pytest.raises(ValueError):
        compare_trainers(damage(make_scores()), resamples=99)
