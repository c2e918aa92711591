"""The heat map that both pictures have, names beside lines, and the picture of several models."""

import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from nnunet_lomix.loss.maps import list_maps
from nnunet_lomix.weights.pictures import draw_heat_map, plot_groups, spread
from nnunet_lomix.weights.summary import Group

from .layout import find_overlaps


@pytest.fixture
def cells():
    """Draws values of maps; gives for each pair of labels (operator, subset) what is written there and its colour."""

    def draw(values, maps, colours="viridis"):
        ax = Figure().subplots()
        draw_heat_map(ax, values, maps, Normalize(0, 1), colours, ".2f")
        operators = [label.get_text() for label in ax.get_yticklabels()]
        subsets = [label.get_text() for label in ax.get_xticklabels()]
        written = {}
        for text in ax.texts:
            column, row = text.get_position()
            written[operators[row], subsets[column]] = text.get_text(), text.get_color()
        return written

    return draw


def test_every_value_is_in_its_place_whatever_the_order_of_the_maps(cells):
    maps = list_maps(4, 3, ("add", "multiply"))
    random.Random(0).shuffle(maps)
    values = {m.name: i / len(maps) for i, m in enumerate(maps)}
    expected = {}
    for name, value in values.items():
        operator, *scales = name.split("_")
        expected["original" if operator == "z" else operator, "+".join(scales)] = f"{value:.2f}"
    assert {place: text for place, (text, _) in cells(values, maps).items()} == expected


def test_a_map_without_a_value_stays_empty(cells):
    maps = list_maps(2, 2, ("add",))
    assert cells({"z_1": 0.5, "add_0_1": 0.25}, maps).keys() == {("original", "1"), ("add", "0+1")}


def test_text_is_told_from_its_cell(cells):
    """The colours of viridis run from dark to bright, and those of Greys from white to black."""
    maps = list_maps(2, 2, ())
    for colours, expected in {"viridis": ["white", "black"], "Greys": ["black", "white"]}.items():
        written = cells({"z_0": 0, "z_1": 1}, maps, colours)
        assert [written["original", scale][1] for scale in ("0", "1")] == expected


@given(st.lists(st.floats(0, 1), max_size=15), st.floats(0, 0.2))
def test_names_are_apart_in_their_order_and_stay_where_there_is_room(heights, distance):
    heights = sorted(heights)
    placed = np.array(spread(heights, distance))
    assert len(placed) == len(heights)
    room = min(distance, 1 / max(len(heights) - 1, 1))
    assert (np.diff(placed) >= room - 1e-9).all()
    assert (placed >= -1e-9).all() and (placed <= 1 + 1e-9).all()
    if (np.diff(heights) >= distance).all():
        np.testing.assert_allclose(placed, heights, atol=1e-9)


def group(name, folds, maps, epochs=4):
    rng = np.random.default_rng(len(maps) + folds)
    names = [m.name for m in maps]
    weights = {f"fold_{i}": rng.random((epochs, len(maps))) + 0.1 for i in range(folds)}
    return Group(name, {fold: pd.DataFrame(values, columns=names) for fold, values in weights.items()}, maps)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws groups; gives the figure."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))

    def draw(*groups):
        plot_groups(groups, tmp_path / "weights.png")
        return figures[-1]

    return draw


LONG = "seed_0/Dataset004_Hippocampus/nnUNetTrainerLoMixFixedWeights_50epochs__nnUNetResEncUNetMPlans__3d_fullres"


@pytest.mark.parametrize(
    "names, folds", [(["T"], 1), (["T"], 2), (["T", "U"], 2), ([LONG, LONG + ", 5 training cases", "U"], 5)]
)
def test_no_text_is_cut_or_over_another_one(drawn, names, folds):
    """From two folds on, titles were over each other and cut, and the name of a line was over the frame."""
    maps = [list_maps(4, 4, ("add", "multiply", "concat", "fusion")), list_maps(3, 3, ("add",)), list_maps(2, 2, ())]
    figure = drawn(*(group(name, folds, own) for name, own in zip(names, maps, strict=False)))
    assert find_overlaps(figure) == []


def test_each_group_has_a_column_with_its_own_values_on_common_axes(drawn):
    maps = list_maps(3, 2, ("add",))
    first, second = group("T", 1, maps), group("U", 2, maps)
    figure = drawn(first, second)
    assert [part.get_suptitle() for part in figure.subfigs] == ["T", "U"]
    for part, own in zip(figure.subfigs, (first, second), strict=True):
        heat_map, scales, *_ = part.axes
        relative = own.last / own.last.mean()
        expected = {f"{100 * (value - 1):+.0f}".replace("-", "\N{MINUS SIGN}") for value in relative.mean(axis=1)}
        assert {text.get_text() for text in heat_map.texts} == expected
        assert len(scales.patches) == 3
    for a, b in zip(figure.subfigs[0].axes[1:], figure.subfigs[1].axes[1:], strict=True):
        assert a.get_ylim() == b.get_ylim()
    norms = [part.axes[0].images[0].norm for part in figure.subfigs]
    assert norms[0].vmax == norms[1].vmax and norms[0].vmin == norms[1].vmin
