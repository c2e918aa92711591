"""Axes of the plots, and pictures that repeat."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_lomix.compare import plots
from nnunet_lomix.compare.findings import describe
from tests.compare.made_up import TRAINERS, make_curves, make_result, make_scores


@settings(max_examples=200)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30), st.floats(0, 100))
def test_axes_hold_the_interval_and_most_points(sizes, interval):
    limit = plots.choose_limit(np.array(sizes), interval)
    assert limit > 0
    assert not limit < interval
    assert np.mean(np.array(sizes) <= limit) >= 0.9 - 1 / len(sizes)


def test_pictures_repeat_to_the_byte_and_say_what_they_show():
    (table,) = describe(make_result(make_scores(metrics=["HD95"]))).tables
    pictures = (
        lambda: plots.draw_differences(table, TRAINERS, TRAINERS[1]),
        lambda: plots.draw_distributions(table, TRAINERS),
        lambda: plots.draw_curves(make_curves(), TRAINERS),
    )
    for draw in pictures:
        assert draw() == draw()
    assert "← better" in pictures[0]() and f"HD95 of {TRAINERS[1]} minus {TRAINERS[0]}: liver " in pictures[0]()
    assert "mm, ← lower is better" in pictures[1]()


@pytest.mark.parametrize("cases", [1, 2])
def test_missing_intervals_are_no_obstacle(cases):
    (table,) = describe(make_result(make_scores(cases="ab"[:cases], metrics=["Dice"]))).tables
    assert plots.draw_differences(table, TRAINERS, TRAINERS[1]).startswith("<svg")
