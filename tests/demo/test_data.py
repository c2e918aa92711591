"""The images of the demo."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_lomix import demo
from nnunet_lomix.demo import data


@pytest.mark.parametrize("settings", demo.DEFAULTS.values(), ids=["2D", "3D"])
def test_every_case_has_every_class(settings):
    shape = (settings.size,) * settings.dim
    for seed in range(settings.train_cases + settings.test_cases):
        image, labels = data.make_case(shape, seed)
        assert image.shape == labels.shape == shape
        assert np.isfinite(image).all()
        assert np.unique(labels).tolist() == sorted(data.LABELS.values()), seed


def test_cases_are_seeded():
    for first, second in zip(data.make_case((64, 48), 3), data.make_case((64, 48), 3), strict=True):
        np.testing.assert_array_equal(first, second)
    assert (data.make_case((64, 48), 3)[1] != data.make_case((64, 48), 4)[1]).any()


def test_structures_have_several_scales():
    counts = sum(np.bincount(data.make_case((64, 64), seed)[1].ravel(), minlength=5) for seed in range(20))
    large, small, lesion, vessels = counts[1:] / counts.sum()
    assert large > 3 * small > 0
    assert large > 3 * lesion > 0
    assert vessels < large


def test_dataset_on_disk_is_that_of_make_case(tmp_path):
    folder = tmp_path / "raw" / "Dataset999_Test"
    seen = []
    data.write_dataset(folder, (32, 40), train_cases=5, test_cases=2, on_case=seen.append)
    assert seen == list(range(1, 8))
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 5
    (fold,) = json.loads((folder / "splits_final.json").read_text())
    assert sorted(fold["train"] + fold["val"]) == [f"case_{seed:03}" for seed in range(5)]
    for part, seeds in {"Tr": range(5), "Ts": range(5, 7)}.items():
        assert len(list((folder / f"images{part}").iterdir())) == len(seeds)
        for seed in seeds:
            image, labels = data.make_case((32, 40), seed)
            written = [
                folder / f"images{part}/case_{seed:03}_0000.nii.gz",
                folder / f"labels{part}/case_{seed:03}.nii.gz",
            ]
            for file, expected in zip(written, (image, labels), strict=True):
                np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(file))), expected)


def test_an_interrupted_dataset_does_not_look_complete(tmp_path):
    def interrupt(done):
        raise KeyboardInterrupt

    folder = tmp_path / "Dataset999_Test"
    with pytest.raises(KeyboardInterrupt):
        data.write_dataset(folder, (32, 32), 2, 1, interrupt)
    assert not folder.exists()
    data.write_dataset(folder, (32, 32), 2, 1)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
