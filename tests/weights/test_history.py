"""The table and the picture of the weights."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nnunet_lomix.loss.maps import list_maps
from nnunet_lomix.weights.history import plot_history, write_history

from .layout import find_overlaps

MAPS = list_maps(4, 3, ("add", "multiply"))


def weights(seed):
    v = np.random.default_rng(seed).random(len(MAPS))
    return {m.name: float(w) for m, w in zip(MAPS, v / v.sum(), strict=True)}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws a history; gives the axes of the heat map and of the evolution."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))

    def draw(history):
        plot_history(history, MAPS, tmp_path)
        assert (tmp_path / "lomix_weights.png").stat().st_size > 0
        return figures[-1].axes

    return draw


def test_table_has_a_row_an_epoch(tmp_path):
    history = [{}, weights(0), weights(1)]
    write_history(history, tmp_path)
    table = pd.read_csv(tmp_path / "lomix_weights.csv", index_col="epoch")
    assert list(table.columns) == [m.name for m in MAPS] and list(table.index) == [0, 1, 2]
    assert table.loc[0].isna().all()
    np.testing.assert_allclose(table.loc[2], list(history[2].values()), rtol=1e-5)


@pytest.mark.parametrize("total", [1.0, 13.0])
def test_lines_are_the_weights_relative_to_their_first_sum(total, drawn):
    history = [weights(seed) for seed in range(3)]
    _, evolution = drawn([{name: total * w for name, w in epoch.items()} for epoch in history])
    for line, m in zip(evolution.lines, MAPS, strict=True):
        np.testing.assert_allclose(line.get_ydata(), [100 * epoch[m.name] for epoch in history])


@pytest.mark.parametrize("history", [[weights(0)], [{}, {}, weights(0)]])
def test_a_single_epoch_is_visible(drawn, history):
    """After a checkpoint of nnUNetTrainer had been continued, the picture of the first epoch was empty."""
    _, evolution = drawn(history)
    assert all(line.get_marker() == "o" for line in evolution.lines)


def equal_weights(share):
    """For z_0 this share, the same for each other map."""
    return {m.name: share if m.name == "z_0" else (1 - share) / (len(MAPS) - 1) for m in MAPS}


@pytest.mark.parametrize(
    "history",
    [[weights(0)], [{}, weights(1), weights(2)], 3 * [equal_weights(1)], 3 * [equal_weights(1 / len(MAPS))]],
    ids=["one epoch", "continued", "all for z_0", "equal"],
)
def test_no_text_is_cut_or_over_another_one(drawn, history):
    assert find_overlaps(drawn(history)[0].figure) == []


def test_all_weight_for_z_0_is_readable(drawn):
    """Which its guaranteed share could give before. A logarithmic axis has no zero."""
    heat_map, evolution = drawn(3 * [equal_weights(1)])
    written = {text.get_text(): text.get_color() for text in heat_map.texts}
    assert written == {"100.0": "black", "0.0": "white"}  # on yellow, and on dark blue
    finest, *others = evolution.lines
    np.testing.assert_allclose(finest.get_ydata(), 100)
    assert np.isnan([line.get_ydata() for line in others]).all()
    assert [text.get_text() for text in evolution.texts] == ["z_0"]


def test_lines_that_matter_are_named(drawn):
    """Of each operator the heaviest and the lightest map, in the order of their weights."""
    last = dict(zip((m.name for m in MAPS), (0.5, 0.02, 0.03, 0.04, *(0.05 + 0.01 * i for i in range(8))), strict=True))
    _, evolution = drawn([last, last])
    total = sum(last.values())
    heights = {text.get_text(): text.get_position()[1] for text in evolution.texts}
    expected = ["z_1", "add_0_1", "add_0_1_2", "multiply_0_1", "multiply_0_1_2", "z_0"]
    assert sorted(heights, key=heights.__getitem__) == expected
    for text in evolution.texts:  # each points to the end of its own line
        np.testing.assert_allclose(text.xy, (1, 100 * last[text.get_text()] / total))


def test_of_equal_weights_the_first_map_is_named(drawn):
    """In the order of the maps: a set, which was walked before, has another order in each process."""
    _, evolution = drawn(2 * [equal_weights(1 / len(MAPS))])
    assert {text.get_text() for text in evolution.texts} == {"z_0", "add_0_1", "multiply_0_1"}
