"""Metrics of masks, against brute force over sets of voxels and boundary elements, and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunet_lomix.compare.metrics import METRICS, USUAL, choose_metrics
from nnunet_lomix.errors import UsageError
from tests.compare.oracle import brute_hd95, brute_nsd

SPACINGS = (0.7, 1.0, 5.0)
TOLERANCES = (0.0, 0.9, 2.3, 6.1)  # no distance of two points of a grid with these spacings


def measure(a, b, spacing, tolerance) -> list[float]:
    return [METRICS[name].measure(a, b, spacing, tolerance, diagonal=99.0) for name in USUAL]


@st.composite
def pairs_of_masks(draw):
    shape = draw(st.sampled_from([(5, 6), (1, 4), (7, 7), (3, 4, 5), (5, 5, 5), (1, 3, 3), (2, 6, 1)]))
    masks = [draw(arrays(bool, shape, elements=st.booleans(), fill=st.just(draw(st.booleans())))) for _ in range(2)]
    spacing = tuple(draw(st.sampled_from(SPACINGS)) for _ in shape)
    return *masks, spacing, draw(st.sampled_from(TOLERANCES))


@settings(max_examples=120)
@given(pairs_of_masks())
def test_metrics_equal_brute_force(pair):
    a, b, spacing, tolerance = pair
    dice, nsd, hd95, iou = values = measure(a, b, spacing, tolerance)
    if a.any() and b.any():
        points_a, points_b = (set(map(tuple, np.argwhere(mask))) for mask in (a, b))
        assert dice == pytest.approx(2 * len(points_a & points_b) / (len(points_a) + len(points_b)), abs=1e-12)
        assert iou == pytest.approx(len(points_a & points_b) / len(points_a | points_b), abs=1e-12)
        assert nsd == pytest.approx(brute_nsd(a, b, spacing, tolerance), abs=1e-5)
        assert hd95 == pytest.approx(brute_hd95(a, b, spacing), rel=1e-5)
    else:
        assert values == ([0, 0, 99, 0] if a.any() or b.any() else [1, 1, 0, 1])
    assert measure(b, a, spacing, tolerance) == pytest.approx(values, abs=1e-6)


def single(shape, *voxels) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


ADVERSARIAL = {
    "one voxel each, apart": (single((9, 9, 9), (0, 0, 0)), single((9, 9, 9), (8, 8, 8))),
    "one voxel in a corner, and everything": (single((5, 6, 7), (4, 5, 6)), np.ones((5, 6, 7), bool)),
    "everything twice": (np.ones((4, 5, 6), bool), np.ones((4, 5, 6), bool)),
    "a chessboard and its negative": ((np.indices((6, 6, 6)).sum(0) % 2 == 0), (np.indices((6, 6, 6)).sum(0) % 2 == 1)),
    "a shell and its inside": (np.pad(np.zeros((4,) * 3, bool), 1, constant_values=True), single((6,) * 3, (2, 2, 2))),
    "touching two opposite faces, 2D": (np.eye(8, dtype=bool), np.eye(8, dtype=bool)[::-1].copy()),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_masks(name):
    a, b = ADVERSARIAL[name]
    for spacing in ((5.0, 0.7, 1.0)[: a.ndim], (0.7, 1.0, 5.0)[: a.ndim]):
        for tolerance in TOLERANCES:
            _, nsd, hd95, _ = measure(a, b, spacing, tolerance)
            assert nsd == pytest.approx(brute_nsd(a, b, spacing, tolerance), abs=1e-5)
            assert hd95 == pytest.approx(brute_hd95(a, b, spacing), rel=1e-5)


def test_known_values():
    """Two plates of 10 × 10 voxels of 1 mm², one slice of 5 mm apart."""
    a, b = np.zeros((2, 4, 10, 10), bool)
    a[1], b[2] = True, True
    dice, nsd, hd95, iou = measure(a, b, (5.0, 1.0, 1.0), 4.9)
    assert (dice, hd95, iou) == (0, 5, 0)
    # the side of each plate that faces the other one is its boundary, too
    assert nsd == pytest.approx(0.5, abs=1e-6)
    assert measure(a, b, (5.0, 1.0, 1.0), 5.1)[1] == 1


# clDice, whose centre lines are scikit-image's


def cl_dice(a, b) -> float:
    return METRICS["clDice"].measure(a, b, (5.0, 0.7, 1.0)[: a.ndim], 1.0, 99.0)


def box(*slices, shape=(11, 11, 30)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[slices] = True
    return mask


LINE = box(5, 5, slice(5, 25))
CL_DICE = {
    "what counts is the centre line, not the width": (box(slice(4, 7), slice(4, 7), slice(4, 26)), LINE, 1),
    "half of a vessel": (LINE, box(5, 5, slice(5, 15)), 2 / 3),  # precision 1, sensitivity 1/2
    "a false vessel as long as the true one": (LINE, LINE | box(0, 0, slice(5, 25)), 2 / 3),
    "beside each other": (LINE, box(5, 6, slice(5, 25)), 0),
    "half of it in 2D": (LINE[5], LINE[5] & (np.arange(30) < 15), 2 / 3),
    # scikit-image erases such pieces
    "as wide as two voxels": (box(*[slice(4, 6)] * 2), box(*[slice(4, 6)] * 2), 1),
    "a piece that is erased beside one that isn't": (LINE, LINE | box(slice(0, 2), slice(0, 2), slice(0, 5)), 2 / 3),
}


@pytest.mark.parametrize("name", CL_DICE)
def test_cl_dice_by_hand(name):
    a, b, expected = CL_DICE[name]
    assert cl_dice(a, b) == cl_dice(b, a) == pytest.approx(expected)


@settings(max_examples=60)
@given(pairs_of_masks())
def test_cl_dice_is_a_share(pair):
    a, b, *_ = pair
    assert 0 <= cl_dice(a, b) == cl_dice(b, a) <= 1
    assert cl_dice(a, a) == cl_dice(b, b) == 1
    if not (a & b).any():
        assert cl_dice(a, b) == (not a.any() and not b.any())


def test_metrics_are_chosen_by_name():
    assert choose_metrics([]) == USUAL == ("Dice", "NSD", "HD95", "IoU")
    assert choose_metrics(["clDice", "Dice", "clDice"]) == ("clDice", "Dice")
    with pytest.raises(UsageError, match="no metric 'dice': choose from Dice, NSD, HD95, IoU, clDice"):
        choose_metrics(["dice"])
