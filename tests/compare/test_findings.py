"""What is said of made-up scores: sentences, verdicts, and numbers in the units that are shown."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

from nnunet_lomix.compare.findings import MOST_DRAWN, describe, headline
from tests.compare.made_up import TRAINERS, make_curves, make_result, make_scores


def row(metric="Dice", difference=1.2, low=0.3, high=2.1, p=0.01, trainings=1, ties=0, verdict="better"):
    ends = {"difference": difference, "difference_low": low, "difference_high": high, "p_holm": p}
    seeds = {"by_seed": [81.2] * trainings, "reference_by_seed": [80.0] * trainings}
    names = {"metric": metric, "trainer": "New", "reference": "Old"}
    return SimpleNamespace(**names, ties=ties, verdict=verdict, **ends, **seeds)


HIGHER = "New's mean Dice over 26 cases is 1.2 points higher than Old's"
HD95 = "New's mean HD95 over 26 cases is 0.4 mm"
TWO, INTERVAL = "These two networks: ", "(95 % interval 0.3 to 2.1)"


@pytest.mark.parametrize(
    "given_row, expected",
    [
        (row(), f"{TWO}{HIGHER} {INTERVAL}."),
        (row(difference=-1.2, low=-2.1, high=-0.3), f"{TWO}{HIGHER.replace('higher', 'lower')} {INTERVAL}."),
        (
            row(difference=0.4, low=-0.5, high=1.3, p=0.3),
            "New and Old: no difference in mean Dice that these 26 cases can show "
            "(+0.4 points, 95 % interval −0.5 to +1.3).",
        ),
        (
            row("HD95", -0.4, -0.7, -0.1),
            f"{TWO}{HD95} smaller than Old's, which is better (95 % interval 0.1 to 0.7).",
        ),
        (row("HD95", 0.4, 0.1, 0.7), f"{TWO}{HD95} larger than Old's, which is worse (95 % interval 0.1 to 0.7)."),
        # a bound of 0.03 is not 0.0
        (row(low=0.03), f"{TWO}{HIGHER.replace('1.2', '1.20')} (95 % interval 0.03 to 2.10)."),
        (row(p=0.0625), f"{TWO}{HIGHER} {INTERVAL}, but the test doesn't confirm it (p = 0.062)."),
        # surely better in these cases, but the trainings don't agree
        (row(trainings=3, verdict="undecided"), f"{HIGHER} {INTERVAL}, but other trainings may not show it."),
        (row(trainings=3), f"{HIGHER} {INTERVAL}."),
        # no interval, however large the difference
        (row(low=np.nan, high=np.nan, p=1.0), f"{HIGHER}; there is no interval, so it says nothing about other cases."),
        (
            row(difference=0.0, low=0.0, high=0.0, p=1.0, ties=26),
            "New and Old have the same mean Dice in each of 26 cases.",
        ),
    ],
)
def test_headline(given_row, expected):
    assert headline(given_row, 26, {"Dice": "points", "HD95": "mm"}[given_row.metric]) == expected


def planted(seeds=(1, 1)) -> pd.DataFrame:
    """Dice 5 points higher, HD95 3 mm larger in all of 12 cases; so many trainings of reference and candidate."""
    cases = [f"c{i:02}" for i in range(12)]
    old = make_scores(cases, trainers=TRAINERS[:1], metrics=("Dice", "NSD", "HD95"))
    gains = old["metric"].map({"Dice": 0.05, "NSD": 0, "HD95": 3})
    gains += np.random.default_rng(1).uniform(-0.01, 0.01, len(old)) * (old["metric"] == "Dice")
    new = old.assign(trainer=TRAINERS[1], value=old["value"] + gains)
    trainings = [(own, seed) for own, number in zip((old, new), seeds, strict=True) for seed in range(number)]
    parts = [own.assign(seed=seed, value=own["value"] + seed * 1e-4) for own, seed in trainings]
    return pd.concat(parts, ignore_index=True)


def test_words_fit_the_scores_through_all_steps():
    scores = planted()
    told = describe(make_result(scores, resamples=500))
    (item,) = told.headlines
    assert item.verdict == "better"
    assert re.search(r"mean Dice over 12 cases is (4\.9|5\.0|5\.1) points higher than nnUNetTrainer's", item.first)
    nsd, hd95 = item.others
    assert "have the same mean NSD in each of 12 cases" in nsd
    assert "3.0 mm larger" in hd95 and "which is worse" in hd95
    assert "One training each" in item.seeds
    verdicts = {t.metric.name: [rows[1].verdict for rows in t.groups.values()] for t in told.tables}
    assert verdicts == {"Dice": ["better"] * 3, "NSD": ["undecided"] * 3, "HD95": ["worse"] * 3}
    assert {t.metric.name: t.means[1].p for t in told.tables} == {"Dice": "<0.001", "NSD": "1.000", "HD95": "<0.001"}
    means = {t.metric.name: [float(r.mean) for r in t.groups["liver"]] for t in told.tables}
    of_class = scores[scores["class"] == "liver"].groupby(["metric", "trainer"])["value"].mean()
    for metric in ("Dice", "NSD"):
        assert means[metric] == pytest.approx([100 * of_class[metric, t] for t in TRAINERS], abs=0.006)
    assert means["HD95"] == pytest.approx([of_class["HD95", t] for t in TRAINERS], abs=0.006)


def test_how_much_seeds_differ_is_told():
    scores = make_scores(cases=[f"c{i:02}" for i in range(12)], seeds=2)
    scores["value"] = 0.5
    better = (scores["trainer"] == TRAINERS[1]) & (scores["seed"] == 1) & (scores["metric"] == "Dice")
    scores.loc[better, "value"] = 0.7
    told = describe(make_result(scores))
    sentence = told.headlines[0].seeds
    assert "by seed, points: nnUNetTrainerLoMix 50.0 / 70.0, nnUNetTrainer 50.0 / 50.0;" in sentence
    # the standard error is 10 points, and 12.706 times that with one degree of freedom: −117 to +137, if Dice had no
    # bounds. On the scale of artanh(d / 100) it is 1 / (1 − 0.1²) times a hundredth
    half = 12.7062 * 0.1 / 0.99
    low, high = (100 * np.tanh(np.arctanh(0.1) + end) for end in (-half, half))
    assert f"other trainings (Welch's t): −{-low:.1f} to +{high:.1f}." in sentence and -100 < low < high < 100
    assert "not in the interval" in told.methods[-1]


@pytest.mark.parametrize("seeds, about", [((1, 1), "these two networks"), ((3, 1), "these networks"), ((2, 2), "")])
def test_a_single_training_is_two_networks(seeds, about):
    told = describe(make_result(planted(seeds)))
    (item,) = told.headlines
    start = f"{about.capitalize()}: " if about else ""
    assert re.match(start + r"nnUNetTrainerLoMix's mean Dice over 12 cases is (4\.9|5\.0) points higher", item.first)
    assert item.about_networks == bool(about) and item.verdict == "better"
    assert {(row.verdict, row.about) for rows in told.tables[0].groups.values() for row in rows[1:]} == {
        ("better", about)
    }


def test_best_and_worst_of_hd95_are_by_what_is_better():
    scores = make_scores(cases=["same", "much better", "worse"], classes=["x"])
    scores["value"] = 0.5
    new = scores["trainer"] == TRAINERS[1]
    scores.loc[new & (scores["metric"] == "HD95"), "value"] = [0.5, 0.1, 0.9]
    told = describe(make_result(scores))
    assert told.extremes[-1] == (TRAINERS[1], "HD95", "much better", "−0.40 mm", "worse", "+0.40 mm")


def test_cases_that_differ_are_those_of_the_first_seeds():
    cases = ["a", "b", "c", "d"]
    scores = make_scores(cases=cases, classes=["x"], seeds=2, metrics=["Dice"])
    scores["value"] = 0.5
    new = scores["trainer"] == TRAINERS[1]
    gains = dict(zip(cases, (0.1, 0.0, -0.3, 0.2), strict=True))
    scores.loc[new & (scores["seed"] == 0), "value"] += scores["case"].map(gains)
    scores.loc[new & (scores["seed"] == 1) & (scores["case"] == "b"), "value"] = 1.0  # not shown
    told = describe(make_result(scores))
    assert list(told.differing) == ["c", "d", "a"]
    assert told.differing["c"] == {TRAINERS[0]: "50.0", TRAINERS[1]: "20.0"}
    # the list of all cases is of the means over seeds, from the largest loss to the largest gain
    assert list(told.cases) == ["c", "a", "d", "b"] and told.cases["c"] == ["50.00", "35.00", "−15.00"]


def test_of_many_classes_those_that_differ_most_are_drawn():
    classes = [f"organ {i}" for i in range(20)]
    scores = make_scores(classes=classes, metrics=["Dice"])
    for i, name in enumerate(classes):
        own = scores["class"] == name
        scores.loc[own, "value"] = 0.5 + scores.loc[own, "trainer"].eq(TRAINERS[1]) * (i % 2 * 2 - 1) * i / 100
    (table,) = describe(make_result(scores)).tables
    assert table.drawn == [*classes[-MOST_DRAWN:], "mean"] and len(table.groups) == 21


@pytest.mark.parametrize("classes, groups", [(["x"], ["x"]), (["x", "y"], ["x", "y", "mean"])])
def test_one_class_is_its_own_mean(classes, groups):
    (table,) = describe(make_result(make_scores(classes=classes, metrics=["Dice"]))).tables
    assert list(table.groups) == table.drawn == groups
    assert table.means is table.groups[groups[-1]]


def test_a_single_case_has_no_interval():
    told = describe(make_result(make_scores(cases=["only"])))
    assert "over a single case is" in told.headlines[0].first
    rows = [row for table in told.tables for own in table.groups.values() for row in own]
    assert {row.mean_interval for row in rows} == {"–"} and {row.verdict for row in rows} == {"", "undecided"}
    assert {row.about for row in rows} == {""}  # nothing is decided of these networks


@pytest.mark.parametrize("tolerance, text", [(1.0, "within 1 pixel of"), (2.5, "within 2.5 pixels of")])
def test_distances_without_a_scale_are_pixels(tolerance, text):
    result = make_result(make_scores(metrics=("NSD", "HD95")), tolerance, reader=NaturalImage2DIO)
    told = describe(result)
    assert text in told.methods[0] and any("no scale" in note for note in told.notes)
    without = describe(make_result(make_scores(metrics=["Dice"]), tolerance, reader=NaturalImage2DIO))
    assert not any("no scale" in note for note in without.notes)


def test_each_metric_says_what_it_is_and_what_empty_masks_get():
    told = describe(make_result(make_scores(metrics=("clDice", "HD95"))))
    assert "Shit et al., CVPR 2021" in told.methods[0] and "NSD" not in told.methods[0]
    assert "the best value (clDice 100, HD95 0)" in told.methods[0]
    assert "the worst (clDice 0, HD95 the diagonal of the image)" in told.methods[0]


def test_facts_and_information():
    scores = make_scores(seeds=2)
    source = {"configuration": "2d", "folds": ("0", "1"), "curves": make_curves(TRAINERS[:1]), "dataset": "Dataset009"}
    result = make_result(scores, notes=["Left out: x."], **source)
    assert result.information["epoch_seconds"] == {TRAINERS[0]: 60} and result.information["folds"] == ["0", "1"]
    assert result.information["classes"] == {"liver": [1], "tumour": [2]} and result.information["cases"] == 4
    told = describe(result)
    assert told.title == "Dataset009 · 2d" and "Left out: x." in told.notes
    expected = {"dataset": "Dataset009", "folds": "0, 1", "seconds an epoch": "nnUNetTrainer 60.0", "cases": "4"}
    assert expected.items() <= told.facts.items()
    assert told.facts["trainings"] == "nnUNetTrainer 2, nnUNetTrainerLoMix 2"


@pytest.mark.parametrize("cases, warned", [(1, False), (4, True), (5, True), (6, False)])
def test_few_cases_are_told(cases, warned):
    scores = make_scores(cases=[str(i) for i in range(cases)])
    notes = describe(make_result(scores)).notes
    expected = {4: "in 88 of 100 studies at most", 5: "in 94 of 100 studies at most"}
    assert len(notes) == warned and (not warned or expected[cases] in notes[0])
