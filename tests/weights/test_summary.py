"""The numbers by hand, and the sentences that they allow."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from nnunet_lomix.loss.maps import list_maps
from nnunet_lomix.weights.history import parse_map
from nnunet_lomix.weights.summary import Group, agreement, list_weights, shares, summarise

# five maps, whose mean is 0.2
FIRST = {"z_0": 0.2, "z_1": 0.1, "add_0_1": 0.4, "multiply_0_1": 0.1, "add_0_2": 0.2}
SECOND = {"z_0": 0.2, "z_1": 0.14, "add_0_1": 0.36, "multiply_0_1": 0.06, "add_0_2": 0.24}
EQUAL = {m.name: 0.05 for m in list_maps(3, 3, ("add", "max"))}
STRONG = EQUAL | {name: 0.1 for name in EQUAL if name.startswith("max")}
OPPOSITE = EQUAL | {name: 0.1 for name in EQUAL if not name.startswith("max")}


def group(*lasts):
    histories = {f"fold_{i}": pd.DataFrame([last]) for i, last in enumerate(lasts)}
    return Group("T", histories, [parse_map(name) for name in lasts[0]])


def test_shares_by_hand():
    table = shares(group(FIRST, SECOND))
    # scale 0 has all of z_0 and half of three maps, 1 all of z_1 and half of two, 2 half of one
    scales = table.loc["scale"]
    assert list(scales.index) == ["0", "1", "2"]
    np.testing.assert_allclose(scales["equal"], [2.5 / 5, 2 / 5, 0.5 / 5])
    np.testing.assert_allclose(scales["low"], [0.53, 0.35, 0.1])
    np.testing.assert_allclose(scales["high"], [0.55, 0.35, 0.12])
    np.testing.assert_allclose(scales["mean"], [0.54, 0.35, 0.11])
    operators = table.loc["operator"]
    assert list(operators.index) == ["original", "add", "multiply"]
    np.testing.assert_allclose(operators["equal"], [0.4, 0.4, 0.2])
    np.testing.assert_allclose(operators["mean"], [0.32, 0.6, 0.08])


@given(st.data())
def test_shares_are_shares_whatever_the_scale_of_the_weights(data):
    maps = list_maps(12, 3, ("add", "max"))
    values = data.draw(st.lists(st.floats(1e-3, 10), min_size=len(maps), max_size=len(maps)))
    last = {m.name: v for m, v in zip(maps, values, strict=True)}
    table = shares(group(last))
    np.testing.assert_allclose(table.groupby(level=0)[["equal", "mean"]].sum(), 1)
    np.testing.assert_allclose(table, shares(group({name: 7 * v for name, v in last.items()})))
    assert list(table.loc["scale"].index) == [str(scale) for scale in range(12)]


def test_agreement_is_the_mean_of_all_pairs():
    third = dict(zip(FIRST, [0.6, 0.2, 0.05, 0.1, 0.06], strict=True))
    values = [list(fold.values()) for fold in (FIRST, SECOND, third)]
    expected = np.mean([spearmanr(values[a], values[b])[0] for a, b in ((0, 1), (0, 2), (1, 2))])
    assert agreement(group(FIRST, SECOND, third)) == pytest.approx(expected)
    assert np.isnan(agreement(group(FIRST)))


@pytest.mark.parametrize(
    "lasts, sentences",
    [
        ([EQUAL, EQUAL], ["Neither scales nor operators were told apart", "by more than 0.0 %."]),
        ([EQUAL | {"add_0_1": 0.053}], ["by more than 5.4 %."]),  # 0.053 against a mean of 0.0503
        # of 11 maps 4 have twice as much: 0.1 / 0.0682
        ([STRONG], ["operator max gained most (+47 %), add least (−27 %)", "heaviest map, max_", "1.47 times"]),
        ([STRONG], ["No scale differs from equal weights by more than ", "this is one training, another one may"]),
        # the mean hides what each of them has
        ([STRONG, OPPOSITE], ["Single trainings differ from equal weights by up to 47 %, but their mean by no more"]),
        ([STRONG, OPPOSITE], ["do not agree on it, so take it for chance (mean correlation −1.00)"]),
        ([STRONG, STRONG], ["the 2 trainings agree on it (mean correlation 1.00)"]),
        ([STRONG, EQUAL], ["no agreement to speak of"]),
        ([EQUAL | {"z_2": 0.3}], ["Against equal weights scale 2 gained most"]),
    ],
)
def test_sentences(lasts, sentences):
    text = summarise(group(*lasts))
    assert all(sentence in text for sentence in sentences), text


def test_every_weight_is_listed():
    history = pd.DataFrame([{}, FIRST, {name: 2 * weight for name, weight in SECOND.items()}])
    table = list_weights([Group("T", {"fold_3": history}, [parse_map(name) for name in FIRST])])
    columns = ["group", "fold", "epoch", "map", "operator", "scales", "weight", "share", "relative"]
    assert list(table) == columns and len(table) == 15
    assert list(table["map"]) == 3 * list(FIRST) and list(table["epoch"]) == [*5 * [0], *5 * [1], *5 * [2]]
    assert table.loc[12].tolist() == ["T", "fold_3", 2, "add_0_1", "add", "0+1", 0.72, 0.36, pytest.approx(1.8)]
    assert table[table["epoch"] == 0][["weight", "share", "relative"]].isna().all(axis=None)
