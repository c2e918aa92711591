"""The table and the picture of the weights."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nnunet_lomix.loss.maps import list_maps
from nnunet_lomix.weights.history import plot_history, write_history

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
    lines = drawn([{name: total * w for name, w in epoch.items()} for epoch in history])[1].lines
    assert len(lines) == len(MAPS)
    for line, m in zip(lines, MAPS, strict=True):
        np.testing.assert_allclose(line.get_ydata(), [100 * epoch[m.name] for epoch in history])


@pytest.mark.parametrize("history", [[weights(0)], [{}, {}, weights(0)]])
def test_a_single_epoch_is_visible(drawn, history):
    """After a checkpoint of nnUNetTrainer had been continued, the picture of the first epoch was empty."""
    assert all(line.get_marker() == "o" for line in drawn(history)[1].lines)


@pytest.mark.parametrize("share, beyond", [(0.5, True), (1 / len(MAPS), False)])
def test_the_title_says_whether_z_0_is_beyond_the_colours(share, beyond, drawn):
    others = (1 - share) / (len(MAPS) - 1)
    heat_map, _ = drawn([{m.name: share if m.name == "z_0" else others for m in MAPS}])
    assert ("z_0 is beyond" in heat_map.get_title(loc="left")) == beyond
