"""The heat map that both pictures have."""

import random

import pytest
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from nnunet_lomix.loss.maps import list_maps
from nnunet_lomix.weights.pictures import draw_heat_map


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
