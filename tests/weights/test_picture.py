"""What the picture shows, and that all of it can be read: an oracle by the places of texts in it."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from nnunet_lomix.loss.maps import list_maps
from nnunet_lomix.weights import picture
from nnunet_lomix.weights.picture import draw_weights, make_figure
from nnunet_lomix.weights.summary import Group

MAPS = list_maps(4, 3, ("add", "multiply"))
EQUAL = {m.name: 1 / len(MAPS) for m in MAPS}
ALL_FOR_Z_0 = {m.name: float(m.name == "z_0") for m in MAPS}
LONG = "seed_0/Dataset004_Hippocampus/nnUNetTrainerLoMixFixedWeights_50epochs__nnUNetResEncUNetMPlans__3d_fullres"


def weights(seed, maps=MAPS):
    v = np.random.default_rng(seed).random(len(maps)) + 0.05
    return {m.name: float(w) for m, w in zip(maps, v / v.sum(), strict=True)}


def group(*histories, name="", maps=MAPS):
    return Group(name, {f"fold_{i}": pd.DataFrame(history) for i, history in enumerate(histories)}, maps)


def draw(*groups):
    """The axes of each group: heat map, operators, evolution, scales."""
    return [part.axes[:4] for part in make_figure(groups).subfigs]


def find_overlaps(figure: Figure) -> list[str]:
    """Texts that another one or the edge of the picture cuts."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    hidden = set()  # an axis keeps labels of places beyond its ends, which are not drawn
    for axis in figure.findobj(lambda artist: isinstance(artist, Axis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                hidden |= {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]
    # that of the text alone, without the line from a name to what it names; a pixel is what a rounded corner may lack
    places = {text: Text.get_window_extent(text, renderer).padded(-1) for text in texts}
    whole = figure.bbox
    cut = [t.get_text() for t, p in places.items() if not whole.contains(*p.min) or not whole.contains(*p.max)]
    return cut + [
        f"{a.get_text()} over {b.get_text()}" for a, b in combinations(texts, 2) if places[a].overlaps(places[b])
    ]


@pytest.mark.parametrize("history", [[weights(0)], [{}, weights(1), weights(2)], 3 * [ALL_FOR_Z_0], 3 * [EQUAL]])
def test_no_text_of_a_training_is_cut_or_over_another_one(history):
    assert find_overlaps(make_figure([group(history)])) == []


@pytest.mark.parametrize("names, folds", [(["T"], 1), ([LONG, LONG + ", 5 training cases", "U"], 5)])
def test_no_text_of_several_groups_is_cut_or_over_another_one(names, folds):
    maps = [list_maps(4, 4, ("add", "multiply", "concat", "fusion")), list_maps(3, 3, ("add",)), list_maps(2, 2, ())]
    groups = [
        group(*([weights(10 * i + j, own) for j in range(4)] for i in range(folds)), name=name, maps=own)
        for name, own in zip(names, maps, strict=False)
    ]
    assert find_overlaps(make_figure(groups)) == []


def test_every_value_is_in_its_place_whatever_the_order_of_the_maps():
    maps = [MAPS[i] for i in np.random.default_rng(0).permutation(len(MAPS))]
    last = weights(0)
    ((heat_map, *_),) = draw(group([last], maps=maps))
    operators = [label.get_text() for label in heat_map.get_yticklabels()]
    subsets = [label.get_text() for label in heat_map.get_xticklabels()]
    written = {}
    for text in heat_map.texts:
        column, row = text.get_position()
        written[operators[row], subsets[column]] = text.get_text()
    assert written == {(m.operator, m.subset): f"{100 * last[m.name]:.1f}" for m in MAPS}


def test_white_is_an_equal_weight_and_text_is_told_from_its_cell():
    last = EQUAL | {"z_1": 0.001, "z_2": 3.4 / len(MAPS)}
    ((heat_map, *_),) = draw(group([{name: w / sum(last.values()) for name, w in last.items()}]))
    image, texts = heat_map.images[0], {text.get_position(): text.get_color() for text in heat_map.texts}
    colours = image.cmap(image.norm(image.get_array()))[0, :4, :3]
    assert (colours[[0, 3]] > 0.85).all()
    assert colours[1, 2] > 2 * colours[1, 0] and colours[2, 0] > 2 * colours[2, 2]  # blue for less, red for more
    assert [texts[column, 0] for column in range(4)] == ["black", "white", "white", "black"]


def test_folds_are_shown_by_their_mean_and_range():
    a, b = weights(0), weights(1)
    ((heat_map, operators, evolution, scales),) = draw(group([a, a], [b, b]))
    assert heat_map.texts[0].get_text() == f"{50 * (a['z_0'] + b['z_0']):.1f}"
    np.testing.assert_allclose(evolution.lines[0].get_ydata(), 2 * [50 * (a["z_0"] + b["z_0"])])
    add = [100 * sum(w for name, w in fold.items() if name.startswith("add")) for fold in (a, b)]
    bar = operators.patches[1]
    assert bar.get_width() == pytest.approx(np.mean(add))
    ends = operators.collections[0].get_segments()[1][:, 0]
    np.testing.assert_allclose(ends, sorted(add))
    dashed = [segment[0, 0] for segment in operators.collections[1].get_segments()]
    np.testing.assert_allclose(dashed, 3 * [100 / 3])  # 4 of 12 maps each
    assert len(scales.patches) == 4 and sum(bar.get_width() for bar in scales.patches) == pytest.approx(100)


@pytest.mark.parametrize("total", [1.0, 13.0])
def test_lines_are_the_weights_relative_to_their_first_sum(total):
    """That the paper's free weights fade is seen."""
    history = [{}, weights(0), {name: w / 2 for name, w in weights(1).items()}]
    ((_, _, evolution, _),) = draw(group([{name: total * w for name, w in epoch.items()} for epoch in history]))
    for line, m in zip(evolution.lines, MAPS, strict=False):
        np.testing.assert_allclose(line.get_ydata(), [100 * epoch.get(m.name, np.nan) for epoch in history])


@pytest.mark.parametrize("history", [[weights(0)], [{}, {}, weights(0)]])
def test_a_single_epoch_is_visible(history):
    """After a checkpoint of nnUNetTrainer had been continued, the picture of the first epoch was empty."""
    ((_, _, evolution, _),) = draw(group(history))
    assert all(line.get_marker() == "o" for line in evolution.lines[: len(MAPS)])


def test_weights_that_have_faded_are_no_lines():
    faded = {name: 1e-6 * weight for name, weight in EQUAL.items()}
    ((heat_map, _, evolution, _),) = draw(group([EQUAL, faded]))
    assert not evolution.texts and np.isnan([line.get_ydata()[1] for line in evolution.lines[: len(MAPS)]]).all()
    assert {text.get_text() for text in heat_map.texts} == {"8.3"}  # of all weight, 1 / 12


def test_maps_without_weight_have_no_line_and_no_name():
    """A logarithmic axis has no zero."""
    ((_, _, evolution, _),) = draw(group(3 * [ALL_FOR_Z_0]))
    finest, *others = evolution.lines[: len(MAPS)]
    np.testing.assert_allclose(finest.get_ydata(), 100)
    assert np.isnan([line.get_ydata() for line in others]).all()
    assert [text.get_text() for text in evolution.texts] == ["z_0"]


def test_lines_that_matter_are_named():
    """Of each operator the heaviest and the lightest map, in the order of their weights; of equal ones the first."""
    values = np.array([0.5, 0.02, 0.03, 0.04, *(0.05 + 0.01 * np.arange(8))])
    last = dict(zip((m.name for m in MAPS), values / values.sum(), strict=True))
    ((_, _, evolution, _),) = draw(group([last, last]))
    heights = {text.get_text(): text.get_position()[1] for text in evolution.texts}
    expected = ["z_1", "add_0_1", "add_0_1_2", "multiply_0_1", "multiply_0_1_2", "z_0"]
    assert sorted(heights, key=heights.__getitem__) == expected
    for text in evolution.texts:  # each points to the end of its own line
        np.testing.assert_allclose(text.xy, (1, 100 * last[text.get_text()]))
    ((_, _, evolution, _),) = draw(group([EQUAL, EQUAL]))
    assert {text.get_text() for text in evolution.texts} == {"z_0", "add_0_1", "multiply_0_1"}


def test_groups_have_common_axes_and_colours():
    other = list_maps(3, 2, ("add",))
    first, second = draw(group([weights(0)], name="T"), group([weights(1, other)], name="U", maps=other))
    assert [axes.figure.get_suptitle() for axes in (first[0], second[0])] == ["T", "U"]
    (_, operators, evolution, scales), (_, other_operators, other_evolution, other_scales) = first, second
    limits = {axes.get_xlim() for axes in (operators, other_operators, scales, other_scales)}
    assert len(limits) == len({axes.get_ylim() for axes in (evolution, other_evolution)}) == 1
    norms = {(axes.images[0].norm.vmin, axes.images[0].norm.vmax) for axes in (first[0], second[0])}
    assert len(norms) == 1


def test_a_very_wide_picture_is_drawn(tmp_path, monkeypatch):
    """Matplotlib refuses more than 65536 pixels along an axis, which some hundred maps or folds needed."""
    assert picture.LONGEST < 65_536
    monkeypatch.setattr(picture, "LONGEST", 1000)
    draw_weights([group([weights(0)])], tmp_path / "wide.png")
    with Image.open(tmp_path / "wide.png") as image:
        assert 990 < max(image.size) <= 1000
