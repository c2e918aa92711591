"""The demo: its data, its numbers, its refusals, and once all of it."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from click.testing import CliRunner

from nnunet_lomix import demo
from nnunet_lomix.cli import main
from nnunet_lomix.demo import data, steps
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.locks import NAME
from nnunet_lomix.nnunet.results import FoldFolder

NAMES = {"nnUNetTrainerDemo": "nnUNetTrainer", "nnUNetTrainerLoMixDemo": "nnUNetTrainerLoMix"}
SMALLEST = demo.Settings(dim=2, epochs=3, iterations=2, size=64, train_cases=10, test_cases=3, slimming=8)


# data


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
    data.write_dataset(folder, (32, 40), train_cases=3, test_cases=2, on_case=lambda: seen.append(1))
    assert len(seen) == 5
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 3
    (fold,) = json.loads((folder / "splits_final.json").read_text())
    assert sorted(fold["train"] + fold["val"]) == [f"case_{seed:03}" for seed in range(3)]
    for part, seeds in {"Tr": range(3), "Ts": range(3, 5)}.items():
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
    def interrupt():
        raise KeyboardInterrupt

    folder = tmp_path / "Dataset999_Test"
    with pytest.raises(KeyboardInterrupt):
        data.write_dataset(folder, (32, 32), 2, 1, interrupt)
    assert not folder.exists()
    data.write_dataset(folder, (32, 32), 2, 1)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


# refusals


def call(*arguments):
    result = CliRunner().invoke(main, ["demo", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    last = result.output.strip().split("\n")[-1]
    assert last.startswith("Error: ")
    return last


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "choose another --out" in call("--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_length_needs_another_folder(tmp_path):
    demo.claim_folder(tmp_path, demo.default_settings(2, epochs=3))
    message = call("--out", tmp_path, "--epochs", 4)
    assert "epochs = 3, not 4" in message and "choose another --out, or delete that folder" in message


def test_2d_and_3d_share_a_folder(tmp_path):
    for dim in (2, 3, 2):
        demo.claim_folder(tmp_path, demo.default_settings(dim))


def test_a_missing_nnunet_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(data, "make_case", lambda shape, seed: (np.zeros(shape, np.float32), np.zeros(shape, np.uint8)))
    assert "nnUNetv2_plan_and_preprocess is neither beside" in call("--out", tmp_path / "out")


def test_two_demos_in_one_folder(tmp_path):
    (tmp_path / NAME).touch()  # all that is left of a demo that was killed at its very start
    settings = demo.default_settings(2)
    with demo.claim_folder(tmp_path, settings):
        code = "import sys; from nnunet_lomix.cli import main; sys.argv[:1] = ['nnunet_lomix', 'demo']; main()"
        # not started by this process, but by a shell, as a child may work in its parent's folder
        command = [sys.executable, "-c", code, "--out", str(tmp_path)]
        result = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *command], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"is in use: demo by process {os.getpid()} on" in " ".join(result.stderr.split())


# all of it


@pytest.mark.end_to_end
def test_an_interrupted_demo_goes_on(tmp_path, monkeypatch):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.delenv(variable, raising=False)
    out = tmp_path / "a demo"
    count_epochs, interrupted = steps.count_epochs, []

    def interrupt_after_first_epoch(fold):
        if count_epochs(fold) == 1:
            interrupted.append(out / "logs_2d" / f"train_{NAMES[fold.path.parent.name.split('__')[0]]}.log")
            raise KeyboardInterrupt
        return 0

    with monkeypatch.context() as patch, pytest.raises(LoMixError, match="goes on where it stopped"):
        patch.setattr(steps, "count_epochs", interrupt_after_first_epoch)
        demo.run_demo(out, SMALLEST)
    assert ": Epoch 0" in interrupted[0].read_text()
    raw = next(out.glob("raw/*/dataset.json")).stat().st_mtime_ns

    demo.run_demo(out, SMALLEST)
    assert next(out.glob("raw/*/dataset.json")).stat().st_mtime_ns == raw
    assert ": Epoch 0" not in interrupted[0].read_text()
    report = out / "report_2d"
    scores = pd.read_csv(report / "scores.csv")
    assert scores.groupby(["case", "class", "trainer", "metric"]).size().eq(1).all()
    assert set(scores["class"]) == data.LABELS.keys() - {"background"}
    assert list(dict.fromkeys(scores["trainer"])) == ["nnUNetTrainer", "nnUNetTrainerLoMix"]
    assert len(scores) == SMALLEST.test_cases * 4 * 2 * 4
    written = {"report.html", "report.md", "scores.csv", "comparison.json", "scores_cache.json", "lomix_weights.png"}
    assert {p.name for p in report.iterdir()} == {*written, NAME}
    information = json.loads((report / "comparison.json").read_text())["information"]
    assert all(seconds > 0 for seconds in information["epoch_seconds"].values())
    assert "proves nothing" in (report / "report.md").read_text()
    assert (report / "report.html").read_text().count("<img") == SMALLEST.test_cases * 2
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("unfinished_*"))
    weights = pd.read_csv(next(out.rglob("lomix_weights.csv")))
    assert len(weights) == SMALLEST.epochs
    for trainer in NAMES:
        (fold,) = out.glob(f"results/*/{trainer}__*/fold_0")
        assert steps.count_epochs(FoldFolder(fold)) == SMALLEST.epochs
