"""Metrics against brute force over sets of voxels and boundary elements, and against nnU-Net's own Dice and IoU."""

import json
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from skimage.io import imsave
from skimage.measure import marching_cubes, mesh_surface_area

from nnunet_lomix.compare import scoring
from nnunet_lomix.compare.metrics import measure
from nnunet_lomix.compare.scoring import ScoringSettings, score, score_case
from nnunet_lomix.compare.sources import Source
from nnunet_lomix.errors import LoMixError

SPACINGS = (0.7, 1.0, 5.0)
TOLERANCES = (0.0, 0.9, 2.3, 6.1)  # no distance of two points of a grid with these spacings
LABELS = {"liver": (1,), "tumour": (2,), "both": (1, 2)}


def brute_hd95(a: np.ndarray, b: np.ndarray, spacing) -> float:
    points = [np.argwhere(boundary_voxels(mask)) * spacing for mask in (a, b)]
    distances = pairwise(*points)
    return max(np.percentile(distances.min(axis=axis), 95) for axis in (0, 1))


def boundary_voxels(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    inside = np.ones_like(mask)
    for axis, shift in product(range(mask.ndim), (-1, 1)):
        inside &= np.roll(padded, shift, axis)[(slice(1, -1),) * mask.ndim]
    return mask & ~inside


def brute_nsd(a: np.ndarray, b: np.ndarray, spacing, tolerance: float) -> float:
    (points_a, areas_a), (points_b, areas_b) = (boundary_elements(mask, spacing) for mask in (a, b))
    distances = pairwise(points_a, points_b)
    near = areas_a[distances.min(axis=1) <= tolerance].sum() + areas_b[distances.min(axis=0) <= tolerance].sum()
    return near / (areas_a.sum() + areas_b.sum())


def boundary_elements(mask: np.ndarray, spacing) -> tuple[np.ndarray, np.ndarray]:
    """Every corner between voxels of which some are in the mask and some aren't, and the area of boundary there."""
    padded = np.pad(mask, 1)
    points, areas = [], []
    for corner in np.ndindex(*(n + 1 for n in mask.shape)):
        cell = padded[tuple(slice(i, i + 2) for i in corner)]
        if cell.any() and not cell.all():
            points.append(np.multiply(corner, spacing))
            areas.append(area(cell.tobytes(), tuple(spacing)))
    return np.array(points), np.array(areas)


@cache
def area(cell: bytes, spacing: tuple[float, ...]) -> float:
    cell = np.frombuffer(cell, dtype=bool).reshape((2,) * len(spacing))
    if len(spacing) == 3:
        # where voxels of a mask touch by an edge or a corner only, the mask or its complement can be taken as connected
        meshes = (marching_cubes(v.astype(float), 0.5, spacing=spacing, method="lorensen") for v in (cell, ~cell))
        return min(mesh_surface_area(*mesh[:2]) for mesh in meshes)
    corner_cut = np.hypot(*spacing) / 2
    if cell.sum() != 2:
        return corner_cut
    if cell[0, 0] == cell[1, 1]:
        return 2 * corner_cut
    return spacing[1] if cell[0, 0] == cell[0, 1] else spacing[0]


def pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a[:, None] - b[None], axis=-1)


@st.composite
def pairs_of_masks(draw):
    shape = draw(st.sampled_from([(5, 6), (1, 4), (7, 7), (3, 4, 5), (5, 5, 5), (1, 3, 3), (2, 6, 1)]))
    masks = [draw(arrays(bool, shape, elements=st.booleans(), fill=st.just(draw(st.booleans())))) for _ in range(2)]
    spacing = tuple(draw(st.sampled_from(SPACINGS)) for _ in shape)
    return *masks, spacing, draw(st.sampled_from(TOLERANCES))


@settings(max_examples=120, deadline=None)
@given(pairs_of_masks())
def test_metrics_equal_brute_force(pair):
    a, b, spacing, tolerance = pair
    dice, nsd, hd95, iou = measure(a, b, spacing, tolerance, diagonal=99.0)
    if a.any() and b.any():
        points_a, points_b = (set(map(tuple, np.argwhere(mask))) for mask in (a, b))
        assert dice == pytest.approx(2 * len(points_a & points_b) / (len(points_a) + len(points_b)), abs=1e-12)
        assert iou == pytest.approx(len(points_a & points_b) / len(points_a | points_b), abs=1e-12)
        assert nsd == pytest.approx(brute_nsd(a, b, spacing, tolerance), abs=1e-5)
        assert hd95 == pytest.approx(brute_hd95(a, b, spacing), rel=1e-5)
    else:
        assert [dice, nsd, hd95, iou] == ([0, 0, 99, 0] if a.any() or b.any() else [1, 1, 0, 1])
    assert measure(b, a, spacing, tolerance, 99.0) == pytest.approx([dice, nsd, hd95, iou], abs=1e-6)


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
            _, nsd, hd95, _ = measure(a, b, spacing, tolerance, 0.0)
            assert nsd == pytest.approx(brute_nsd(a, b, spacing, tolerance), abs=1e-5)
            assert hd95 == pytest.approx(brute_hd95(a, b, spacing), rel=1e-5)


def test_known_values():
    """Two plates of 10 × 10 voxels of 1 mm², one slice of 5 mm apart."""
    a, b = np.zeros((2, 4, 10, 10), bool)
    a[1], b[2] = True, True
    dice, nsd, hd95, iou = measure(a, b, (5.0, 1.0, 1.0), 4.9, 0.0)
    assert (dice, hd95, iou) == (0, 5, 0)
    # the side of each plate that faces the other one is its boundary, too
    assert nsd == pytest.approx(0.5, abs=1e-6)
    assert measure(a, b, (5.0, 1.0, 1.0), 5.1, 0.0)[1] == 1


# files


def write(labels: np.ndarray, path: Path, spacing=(5.0, 0.7, 1.0)) -> Path:
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, path)
    return path


def random_labels(seed: int, shape=(6, 14, 12), highest=2) -> np.ndarray:
    """A few boxes of each label, some at the border."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    for value in [*range(1, highest + 1)] * 2:
        corner = [rng.integers(0, n) for n in shape]
        labels[tuple(slice(c, c + rng.integers(1, 7)) for c in corner)] = value
    return labels


@pytest.fixture
def scoring_settings() -> ScoringSettings:
    return ScoringSettings(LABELS, ignore=3, tolerance=1.5, reader=SimpleITKIO)


@pytest.mark.parametrize("seed", range(8))
def test_files_equal_brute_force_on_whole_images(tmp_path, scoring_settings, seed):
    """Neither the windows around labels nor the order of the axes may change anything; Dice and IoU are nnU-Net's."""
    expected, predicted = random_labels(seed), random_labels(seed + 100)
    expected[:, 3:5] = 3  # to be ignored
    files = [write(labels, tmp_path / f"{i}.nii.gz") for i, labels in enumerate((expected, predicted))]
    ((scores, *_),) = score_case(files[0], {"p": files[1]}, scoring_settings).values()
    values = [list(v) if len(v) > 1 else v[0] for v in LABELS.values()]
    theirs = compute_metrics(
        *map(str, files), SimpleITKIO(), [tuple(v) if isinstance(v, list) else v for v in values], 3
    )
    spacing, ignored = (5.0, 0.7, 1.0), expected == 3
    for own, (name, label), their in zip(scores, LABELS.items(), theirs["metrics"].values(), strict=True):
        a, b = (np.isin(labels, label) & ~ignored for labels in (expected, predicted))
        if a.any() and b.any():
            assert [own[0], own[3]] == pytest.approx([their["Dice"], their["IoU"]], abs=1e-9), name
            assert own[1] == pytest.approx(brute_nsd(a, b, spacing, 1.5), abs=1e-5), name
            assert own[2] == pytest.approx(brute_hd95(a, b, spacing), rel=1e-5), name
        elif a.any() or b.any():
            assert own == [0, 0, pytest.approx(np.linalg.norm(np.multiply(expected.shape, spacing)), rel=1e-5), 0]
        else:
            assert own == [1, 1, 0, 1]


def test_ignored_voxels_count_for_neither(tmp_path, scoring_settings):
    expected, predicted = random_labels(1), random_labels(2)
    expected[2:4] = 3
    reference = write(expected, tmp_path / "r.nii.gz")
    other = predicted.copy()
    other[2:4] = 1 - (predicted[2:4] > 0)
    files = {"a": write(predicted, tmp_path / "a.nii.gz"), "b": write(other, tmp_path / "b.nii.gz")}
    scores = score_case(reference, files, scoring_settings)
    assert (predicted != other).any() and scores["a"].scores == scores["b"].scores
    everywhere = score_case(reference, files, ScoringSettings(LABELS, None, 1.5, SimpleITKIO))
    assert everywhere["a"].scores != everywhere["b"].scores


@pytest.mark.parametrize("ignore", [None, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_region_may_contain_background(tmp_path, seed, ignore):
    """nnU-Net's LabelManager allows it; Dice is nnU-Net's, the boundaries are those of the whole image."""
    expected, predicted = random_labels(seed), random_labels(seed + 100)
    if ignore:
        expected[:, 3:5] = ignore
    files = [write(labels, tmp_path / f"{i}.nii.gz") for i, labels in enumerate((expected, predicted))]
    regions = {"all but 2": (0, 1), "2": (2,), "not there but 0": (0, 5)}
    ((scores, *_),) = score_case(files[0], {"p": files[1]}, ScoringSettings(regions, ignore, 1.5, SimpleITKIO)).values()
    theirs = compute_metrics(*map(str, files), SimpleITKIO(), list(regions.values()), ignore)["metrics"]
    counted = expected != 3
    for own, values in zip(scores, regions.values(), strict=True):
        a, b = (np.isin(labels, values) & counted for labels in (expected, predicted))
        assert [own[0], own[3]] == pytest.approx([theirs[values][name] for name in ("Dice", "IoU")], abs=1e-9)
        assert own[1] == pytest.approx(brute_nsd(a, b, (5.0, 0.7, 1.0), 1.5), abs=1e-5)
        assert own[2] == pytest.approx(brute_hd95(a, b, (5.0, 0.7, 1.0)), rel=1e-5)


def test_pictures_are_2d_with_pixels_of_1(tmp_path):
    a, b = (random_labels(seed, (20, 30), 1) for seed in (3, 4))
    for name, labels in (("a", a), ("b", b)):
        imsave(tmp_path / f"{name}.png", labels, check_contrast=False)
    scoring_settings = ScoringSettings({"cell": (1,)}, None, 2.3, NaturalImage2DIO)
    ((((_, nsd, hd95, _),), *_),) = score_case(tmp_path / "a.png", {"b": tmp_path / "b.png"}, scoring_settings).values()
    assert nsd == pytest.approx(brute_nsd(a > 0, b > 0, (1.0, 1.0), 2.3), abs=1e-5)
    assert hd95 == pytest.approx(brute_hd95(a > 0, b > 0, (1.0, 1.0)), rel=1e-5)


@pytest.mark.parametrize(
    "labels, spacing, message",
    [
        (random_labels(1, (6, 14, 11)), (5.0, 0.7, 1.0), "shape 6 × 14 × 11"),
        (random_labels(1, (14, 12)), (0.7, 1.0), "shape 14 × 12"),
        (random_labels(1), (4.0, 0.7, 1.0), "spacing 4 × 0.7 × 1"),
        (random_labels(1) * np.float32(0.5), (5.0, 0.7, 1.0), "no segmentation"),
    ],
)
def test_refuses_other_grids_and_probabilities_by_name(tmp_path, scoring_settings, labels, spacing, message):
    reference = write(random_labels(0), tmp_path / "reference.nii.gz")
    file = write(labels, tmp_path / "case_7.nii.gz", spacing)
    with pytest.raises(LoMixError, match=rf"case_7\.nii\.gz.*{message}"):
        score_case(reference, {"p": file}, scoring_settings)


def test_refuses_broken_files_by_name(tmp_path, scoring_settings):
    reference = write(random_labels(0), tmp_path / "reference.nii.gz")
    (tmp_path / "case_7.nii.gz").write_bytes(b"not an image")
    with pytest.raises(LoMixError, match=r"can't read .*case_7\.nii\.gz"):
        score_case(reference, {"p": tmp_path / "case_7.nii.gz"}, scoring_settings)


def move(file: Path, **placement):
    image = sitk.ReadImage(str(file))
    for name, value in placement.items():
        getattr(image, f"Set{name}")(value)
    sitk.WriteImage(image, file)
    return file


@pytest.mark.parametrize("placement", [{"Origin": (0, 0, 3)}, {"Direction": (-1, 0, 0, 0, -1, 0, 0, 0, 1)}])
@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
def test_voxels_elsewhere_in_space_are_refused(tmp_path, scoring_settings, placement, reader):
    """The same voxels under another header are another segmentation; in nnU-Net's own results it doesn't look."""
    reference = write(random_labels(0), tmp_path / "reference.nii.gz")
    moved = move(write(random_labels(0), tmp_path / "case_7.nii.gz"), **placement)
    rounded = move(write(random_labels(0), tmp_path / "rounded.nii.gz"), Origin=(0, 0, 0.001))
    scoring_settings = replace(scoring_settings, reader=reader)
    with pytest.raises(LoMixError, match="case_7.* has another origin or direction"):
        score_case(reference, {"p": moved}, scoring_settings)
    expected = score_case(reference, {"p": reference}, scoring_settings)
    assert score_case(reference, {"p": rounded}, scoring_settings) == expected
    assert score_case(reference, {"p": moved}, replace(scoring_settings, placed=False)) == expected


def test_refuses_negative_labels(tmp_path, scoring_settings):
    reference = write(random_labels(0), tmp_path / "reference.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(random_labels(0).astype(np.int16) - 1), tmp_path / "case_7.nii.gz")
    with pytest.raises(LoMixError, match="case_7.* has negative labels"):
        score_case(reference, {"p": tmp_path / "case_7.nii.gz"}, scoring_settings)


# many cases


@pytest.fixture
def source(tmp_path) -> Source:
    """Three cases, two trainers; the second trainer is perfect."""
    references, predictions = {}, {("A", 0): {}, ("B", 0): {}}
    for i, case in enumerate(("x", "y", "z")):
        references[case] = write(random_labels(i), tmp_path / f"{case}.nii.gz")
        predictions["A", 0][case] = write(random_labels(i + 50), tmp_path / f"{case}_A.nii.gz")
        predictions["B", 0][case] = write(random_labels(i), tmp_path / f"{case}_B.nii.gz")
    return Source(references, predictions, {}, LABELS, None, SimpleITKIO, "test", "test")


@pytest.fixture
def scored(monkeypatch) -> list:
    """Names of the predictions that are scored."""
    names = []
    original = scoring.score_case

    def spy(reference, predictions, *arguments):
        names.extend(file.name for file in predictions.values())
        return original(reference, predictions, *arguments)

    monkeypatch.setattr(scoring, "score_case", spy)
    return names


def test_scores_are_tidy(source):
    scores, notes = score(source, 1.0, 1)
    assert not notes and list(scores) == ["case", "class", "trainer", "seed", "metric", "value"]
    assert len(scores) == 3 * 3 * 2 * 4 and not scores.duplicated(["case", "class", "trainer", "seed", "metric"]).any()
    perfect = scores[scores["trainer"] == "B"].groupby("metric")["value"]
    assert perfect.unique().map(list).to_dict() == {"Dice": [1], "NSD": [1], "HD95": [0], "IoU": [1]}
    assert scores.query("trainer == 'A' and metric == 'Dice'")["value"].max() < 1


def test_scores_of_known_content_are_not_computed_again(source, scored, tmp_path):
    file = tmp_path / "cache.json"
    first = score(source, 1.0, 1, file).table
    assert len(scored) == 6
    scored.clear()
    assert score(source, 1.0, 1, file).table.equals(first) and scored == []
    write(random_labels(77), source.predictions["A", 0]["y"])
    assert not score(source, 1.0, 1, file).table.equals(first) and scored == ["y_A.nii.gz"]
    scored.clear()
    write(random_labels(78), source.references["z"])
    score(source, 1.0, 1, file)
    assert scored == ["z_A.nii.gz", "z_B.nii.gz"]


@pytest.mark.parametrize("change", [{"tolerance": 2.0}, {"labels": {"tumour": (2,)}}, {"ignore": 2}, {"version": 99}])
def test_scores_are_computed_again_if_their_meaning_changes(source, scored, tmp_path, monkeypatch, change):
    file = tmp_path / "cache.json"
    score(source, 1.0, 1, file)
    scored.clear()
    monkeypatch.setattr(scoring, "VERSION", change.get("version", scoring.VERSION))
    changed = replace(source, **{name: value for name, value in change.items() if hasattr(source, name)})
    score(changed, change.get("tolerance", 1.0), 1, file)
    assert len(scored) == 6


def test_what_was_scored_before_an_error_is_kept(source, scored, tmp_path):
    file = tmp_path / "cache.json"
    write(random_labels(0, (3, 3, 3)), source.predictions["A", 0]["z"])
    with pytest.raises(LoMixError, match="z_A.nii.gz"):
        score(source, 1.0, 1, file)
    assert len(json.loads(file.read_text())) == 4
    write(random_labels(0), source.predictions["A", 0]["z"])
    scored.clear()
    score(source, 1.0, 1, file)
    assert scored == ["z_A.nii.gz", "z_B.nii.gz"]


def test_a_changed_spacing_beside_a_file_is_another_content(tmp_path):
    """nnU-Net's TIFFs have their spacing in a JSON file."""
    file = tmp_path / "x.tif"
    file.write_bytes(b"pixels")
    (tmp_path / "x.json").write_text('{"spacing": [1, 1, 1]}')
    before = scoring._hash_file(file)
    (tmp_path / "x.json").write_text('{"spacing": [2, 1, 1]}')
    assert scoring._hash_file(file) != before


@pytest.mark.parametrize("content", ["", '{"a":', "3", '[["a"]]', '{"a": [[1, 1, 0]]}', '{"a": {"scores": 1}}'])
def test_a_damaged_cache_is_made_anew(source, scored, tmp_path, content):
    (tmp_path / "cache.json").write_text(content)
    score(source, 1.0, 1, tmp_path / "cache.json")
    assert len(scored) == len(json.loads((tmp_path / "cache.json").read_text())) == 6


def test_scores_are_saved_on_the_way(source, tmp_path, monkeypatch):
    """A job that is killed says no goodbye."""
    written = []
    monkeypatch.setattr(scoring, "SAVED_EVERY", 2)
    monkeypatch.setattr(scoring, "_write_cache", lambda file, results: written.append(len(results)))
    score(source, 1.0, 1, tmp_path / "cache.json")
    assert written == [4, 6]


@pytest.mark.end_to_end
def test_processes_give_the_same(source):
    assert score(source, 1.0, 2).table.equals(score(source, 1.0, 1).table)
    write(random_labels(0, (3, 3, 3)), source.predictions["A", 0]["y"])
    with pytest.raises(LoMixError, match="y_A.nii.gz"):
        score(source, 1.0, 2)
