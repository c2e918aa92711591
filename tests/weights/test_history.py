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
    """Draws a history; gives the axes of the heat map, and of the evolution of z_0 and of the other maps."""
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
    _, finest, others = drawn([{name: total * w for name, w in epoch.items()} for epoch in history])
    lines = [*finest.lines, *others.lines]
    assert MAPS[0].name == "z_0" and len(finest.lines) == 1 and len(lines) == len(MAPS)
    for line, m in zip(lines, MAPS, strict=True):
        np.testing.assert_allclose(line.get_ydata(), [100 * epoch[m.name] for epoch in history])


@pytest.mark.parametrize("share, top", [(0.02, 11), (0.6, 66)])
def test_z_0_is_drawn_on_an_axis_of_its_size(drawn, share, top):
    """Beside nnU-Net's own loss z_0 weighs as little as any map, and was flat on an axis to 100 %."""
    others = {m.name: (1 - share) / (len(MAPS) - 1) for m in MAPS if m.name != "z_0"}
    _, finest, _ = drawn([{"z_0": share, **others}] * 2)
    assert finest.get_ylim() == pytest.approx((0, top))


@pytest.mark.parametrize("history", [[weights(0)], [{}, {}, weights(0)]])
def test_a_single_epoch_is_visible(drawn, history):
    """After a checkpoint of nnUNetTrainer had been continued, the picture of the first epoch was empty."""
    _, finest, others = drawn(history)
    assert all(line.get_marker() == "o" for ax in (finest, others) for line in ax.lines)


@pytest.mark.parametrize("share, beyond", [(0.5, True), (1 / len(MAPS), False)])
def test_the_title_says_whether_z_0_is_beyond_the_colours(share, beyond, drawn):
    others = (1 - share) / (len(MAPS) - 1)
    heat_map, *_ = drawn([{m.name: share if m.name == "z_0" else others for m in MAPS}])
    assert ("z_0 is beyond" in heat_map.get_title(loc="left")) == beyond


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
    """Which a guaranteed share of 1 gives. Before, colours had no range and a logarithmic axis no positive value."""
    heat_map, finest, others = drawn(3 * [equal_weights(1)])
    written = {text.get_text(): text.get_color() for text in heat_map.texts}
    assert written == {"100.0": "black", "0.0": "white"}  # on yellow, and on dark blue
    np.testing.assert_allclose(finest.lines[0].get_ydata(), 100)
    assert finest.get_ylim()[1] > 100
    assert [text.get_text() for text in others.texts] == ["No other map has any weight."]


def test_the_axis_of_the_mutants_is_theirs(drawn):
    """z_0 has half of the weight, each other map at most a tenth of that: the gap between them takes no room."""
    _, finest, others = drawn([equal_weights(0.5), weights(3) | {"z_0": 5.0}])
    values = np.concatenate([line.get_ydata() for line in others.lines])
    low, high = others.get_ylim()
    assert high / values.max() < 1.3 and values.min() / low < 1.3
    assert finest.get_ylim()[0] == 0


def test_lines_that_matter_are_named(drawn):
    """Of each operator the heaviest and the lightest map, and z_0, in the order of their weights."""
    last = dict(zip((m.name for m in MAPS), (0.5, 0.02, 0.03, 0.04, *(0.05 + 0.01 * i for i in range(8))), strict=True))
    _, finest, others = drawn([last, last])
    total = sum(last.values())
    heights = {text.get_text(): text.get_position()[1] for text in others.texts}
    expected = ["z_1", "z_3", "add_0_1", "add_0_1_2", "multiply_0_1", "multiply_0_1_2"]
    assert sorted(heights, key=heights.__getitem__) == expected
    assert [text.get_text() for text in finest.texts] == ["z_0"]
    for text in others.texts:  # each points to the end of its own line
        np.testing.assert_allclose(text.xy, (1, 100 * last[text.get_text()] / total))


@pytest.mark.parametrize("share", [0.5, 1 / len(MAPS)])
def test_of_equal_weights_the_first_map_is_named(drawn, share):
    """In the order of the maps: a set, which was walked before, has another order in each process."""
    others = drawn(2 * [equal_weights(share)])[2]
    assert {text.get_text() for text in others.texts} == {"z_1", "add_0_1", "multiply_0_1"}
