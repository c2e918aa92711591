"""The study's own parts: what it compares, and how it counts."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from torch import nn

from nnunet_lomix.loss import LoMixLoss
from nnunet_lomix.nnunet.datasets import read_splits
from nnunet_lomix.nnunet.results import read_json

from .conftest import STUDY


def test_differences_are_paired_by_case_and_seed() -> None:
    import report

    key = ("D", "full", 10, "sgd")
    rng = np.random.default_rng(0)
    rows, truth = [], []
    for seed in (0, 1, 2):
        for case in range(24):
            base, gain = rng.uniform(0.5, 0.9), rng.normal(0.02 + seed / 100, 0.01)
            truth.append(100 * gain)
            own = (seed, f"p{case // 2}_frame0{case % 2}")
            rows += [(*key, "nnUNetTrainer", *own, "z_0", base), (*key, "better", *own, "z_0", base + gain)]
            rows.append((*key, "better", *own, "fusion", base + 2 * gain))
    rows += [(*key, "better", 3, f"p{c}_frame00", "z_0", 0.0) for c in range(12)]  # nnUNetTrainer lacks this seed
    columns = ["dataset", "size", "steps", "optimiser", "arm", "seed", "case", "output", "dice"]
    scores = pd.DataFrame(rows, columns=columns).assign(nsd=lambda t: t["dice"] / 2, cldice=np.nan)
    scores = scores.sample(frac=1, random_state=0)
    (table,) = report.summarise(scores).values()
    row = table.set_index("arm").loc["better"]
    difference, low, high = (float(n) for n in re.findall(r"[+-][\d.]+", row["Dice, difference"]))
    assert difference == pytest.approx(np.mean(truth), abs=0.006)
    by_seed = np.reshape(truth, (3, 24)).mean(1)
    assert [float(d) for d in row["by seed"].split(", ")] == pytest.approx(by_seed, abs=0.06)
    assert row["seeds"] == 3 and "clDice" not in table
    assert float(row["NSD, difference"].split()[0]) == pytest.approx(np.mean(truth) / 2, abs=0.006)
    # wider than over cases alone, since seeds differ, but between the seeds
    assert by_seed.min() - 0.5 < low < np.mean(truth) - 0.5 and np.mean(truth) + 0.5 < high < by_seed.max() + 0.5

    (turned,) = report.summarise(scores, "better").values()
    turned = turned.set_index("arm").loc["nnUNetTrainer", "Dice, difference"]
    assert float(turned.split()[0]) == -difference
    assert "(" not in report.summarise(scores[scores["seed"] == 0])["D, full, 10 steps of sgd"].to_string()

    without = scores.assign(nsd=scores["nsd"].where(scores["arm"] != "nnUNetTrainer"))  # a run of an earlier harness
    assert "nan" not in report.summarise(without)["D, full, 10 steps of sgd"].fillna("").to_string()

    (fusion,) = report.outputs(scores).to_dict("records")
    assert (fusion["arm"], fusion["output"], fusion["seeds"]) == ("better", "fusion", 3)
    assert float(fusion["Dice, difference"].split()[0]) == pytest.approx(np.mean(truth), abs=0.006)


def test_every_arm_is_a_trainer_that_differs_from_its_base_only_as_it_says() -> None:
    import arms

    for name, (base, differences) in arms.ARMS.items():
        trainer = getattr(arms, f"Study{name}")
        assert issubclass(trainer, base) and issubclass(trainer, arms.Short)
        known = {*dir(base), *dir(arms.Short)}
        assert all(getattr(trainer, key) == value and key in known for key, value in differences.items())
    with pytest.raises(AttributeError):
        arms.StudyUnknown  # noqa: B018


@pytest.mark.parametrize("arm, trainer", [("default", "nnUNetTrainerLoMix"), ("Paper", "nnUNetTrainerLoMixPaper")])
def test_nnunet_finds_an_arm_again_and_again(arm: str, trainer: str) -> None:
    """nnU-Net imports arms.py anew each time."""
    for _ in range(2):
        folder = str(STUDY / "study_trainers")
        found = recursive_find_python_class(folder, f"Study{arm}", None, cleanup_imports_from_base_folder=True)
        assert [cls.__name__ for cls in found.mro()][1:3] == ["Short", trainer]


def test_a_mixture_is_that_of_all_outputs_at_full_resolution() -> None:
    import arms

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Module()
            self.decoder.deep_supervision = False

        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            assert self.decoder.deep_supervision
            return [image, image[..., ::2, ::2]]

    loss = LoMixLoss(3, 2)
    for parameter in loss.parameters():
        nn.init.normal_(parameter)
    mixtures = arms.mixtures(loss)
    assert [*mixtures] == ["concat", "fusion"] and [*arms.mixtures(LoMixLoss(3, 2, ("add",)))] == []
    assert [*arms.mixtures(DeepSupervisionWrapper(nn.L1Loss(), [1.0]))] == ["z_0 + z_1"] and not arms.mixtures(
        nn.L1Loss()
    )
    image = torch.randn(2, 3, 8, 8)
    small = nn.functional.interpolate(image[..., ::2, ::2], size=(8, 8), mode="bilinear")
    expected = oracle_fusion(image, small, loss.operators["fusion"])
    torch.testing.assert_close(arms.Mixed(Network(), mixtures["fusion"])(image), expected)


def oracle_fusion(a: torch.Tensor, b: torch.Tensor, fusion: nn.Module) -> torch.Tensor:
    rows = [(row[3 * i : 3 * i + 3], row[-1]) for i, row in enumerate(fusion.weight[0])]
    scores = [torch.einsum("c,bcyx->byx", w, z) + bias for (w, bias), z in zip(rows, (a, b), strict=True)]
    first = (scores[0] - scores[1]).sigmoid()[:, None]
    return first * a + (1 - first) * b


@pytest.mark.end_to_end
def test_a_study_from_raw_images_to_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import generated
    import report
    import study

    monkeypatch.setattr(generated, "CASES", 6)
    monkeypatch.setattr(study, "EPOCHS", 2)
    monkeypatch.setattr(study, "PIXELS", 2 * 64 * 64)
    options = ["--out", str(tmp_path), "--arms", "default_fusion", "--sizes", "scarce"]
    options += ["--datasets", "Dataset900_Planted", "--seeds", "1", "--steps", "10"]
    result = CliRunner().invoke(study.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output

    scores, curves, weights = (report.read_table(tmp_path, name) for name in ("scores", "curves", "weights"))
    key = {"dataset": "Dataset900_Planted", "size": "scarce", "seed": 1, "steps": 10, "optimiser": "nnunet"}
    assert all((table[name] == value).all() for table in (scores, curves, weights) for name, value in key.items())
    _, *scarce = read_splits(tmp_path / "preprocessed" / "Dataset900_Planted")
    assert len(scarce) == study.MOST_SEEDS and len(scarce[1]["train"]) == 2
    assert set(scores["arm"]) == {"default_fusion"} and sorted(scores["output"].unique()) == ["fusion", "z_0"]
    assert all(cases["case"].tolist() == scarce[1]["val"] for _, cases in scores.groupby("output"))
    assert curves["epoch"].tolist() == [0, 1] and (curves["seconds"] > 0).all()
    (fold,) = tmp_path.glob("results/seed_1_10_steps_nnunet/*/Studydefault_fusion__nnUNetPlans__2d_study/fold_2")
    # as nnU-Net has it
    means = {json_file.parts[-3]: read_json(json_file) for json_file in fold.rglob("summary.json")}
    means = {"z_0" if name == fold.name else name: m["foreground_mean"]["Dice"] for name, m in means.items()}
    assert scores.groupby("output")["dice"].mean().to_dict() == pytest.approx(means, rel=1e-3)
    assert not [*fold.glob("*.pth")] and not [*fold.rglob("*.nii.gz")]
    assert scores[["dice", "nsd", "cldice"]].stack().between(0, 1).all() and curves["train_loss"].nunique() == 2
    assert set(weights["arm"]) == {"default_fusion"} and weights["weight"].sum() == pytest.approx(1, abs=1e-3)
    table = (tmp_path / "table.md").read_text()
    assert table in result.output and "### Outputs, each against z_0" in table and "| fusion " in table

    monkeypatch.setattr(study.Study, "train", lambda self, run: pytest.fail(f"{run} is trained again"))
    again = CliRunner().invoke(study.main, options, catch_exceptions=False)
    assert again.exit_code == 0 and table in again.output


@pytest.mark.parametrize("option", ["--arms", "--sizes", "--datasets"])
def test_a_name_with_a_typo_gets_one_sentence(option: str, tmp_path: Path) -> None:
    import study

    result = CliRunner().invoke(study.main, ["--out", str(tmp_path), option, "nnUNetTrainr"])
    assert result.exit_code == 2 and "unknown nnUNetTrainr; choose from" in result.output


def test_a_seed_without_a_scarce_fold_is_refused(tmp_path: Path) -> None:
    import study

    result = CliRunner().invoke(study.main, ["--out", str(tmp_path), "--seeds", str(study.MOST_SEEDS)])
    assert result.exit_code == 2 and "--seeds takes numbers below" in result.output


@pytest.mark.parametrize("steps", [0, 9, 15])
def test_steps_that_make_no_whole_epochs_are_refused(steps: int, tmp_path: Path) -> None:
    import study

    result = CliRunner().invoke(study.main, ["--out", str(tmp_path), "--steps", str(steps)])
    assert result.exit_code == 2 and f"a multiple of the 10 epochs of a run, got {steps}" in result.output


def test_scarce_folds_have_the_same_validation_cases_and_a_twentieth_for_training() -> None:
    import study

    fold = {"train": [f"t{i}" for i in range(100)], "val": ["v0", "v1"]}
    folds = study.scarce_folds(fold)
    assert len({tuple(f["train"]) for f in folds}) == len(folds) == study.MOST_SEEDS
    for f in folds:
        assert f["val"] == fold["val"] and len(f["train"]) == 5 and set(f["train"]) <= set(fold["train"])
    assert folds == study.scarce_folds({**fold, "train": fold["train"][::-1]})


def test_the_configuration_is_the_planned_one_made_smaller() -> None:
    import study

    planned = {
        "patch_size": [256, 224],
        "spacing": [1.5, 1.5],
        "architecture": {
            "arch_kwargs": {
                "n_stages": 7,
                "features_per_stage": [32, 64, 128, 256, 512, 512, 512],
                "kernel_sizes": [[3, 3]] * 7,
                "strides": [[1, 1]] + [[2, 2]] * 6,
                "n_conv_per_stage": [2] * 7,
                "n_conv_per_stage_decoder": [2] * 6,
            }
        },
    }
    small = study.study_configuration(planned, thin=False)
    kwargs = small["architecture"]["arch_kwargs"]
    assert small["patch_size"] == [96, 96] and small["spacing"] == [3, 3]
    assert kwargs["features_per_stage"] == [16, 32, 64, 128, 256] and kwargs["n_stages"] == 5
    assert len(kwargs["n_conv_per_stage_decoder"]) == 4
    assert study.study_configuration(planned, thin=True)["spacing"] == planned["spacing"]
    assert planned["architecture"]["arch_kwargs"]["n_stages"] == 7


def test_planted_lines_are_as_thin_as_a_pixel() -> None:
    from generated import make_lines

    image, labels = make_lines(0)
    assert image.shape == labels.shape and 0.02 < labels.mean() < 0.2
    # no 3 × 3 block is all line: at a quarter of the resolution nothing is left of it
    blocks = np.lib.stride_tricks.sliding_window_view(labels, (1, 3, 3)).all(axis=(-1, -2, -3))
    assert blocks.mean() < 0.005
    assert image[labels == 1].mean() > image[labels == 0].mean() + 0.5
    assert (make_lines(0)[0] == image).all() and (make_lines(1)[0] != image).any()


def test_organs_of_a_pair_have_one_shade_and_other_places() -> None:
    from generated import PLACES, make_organs

    cases = [make_organs(seed) for seed in range(8)]
    assert all(len(np.unique(labels)) > 5 for _, labels in cases)
    shade = [
        np.mean([image[labels == i].mean() for image, labels in cases if (labels == i).any()]) for i in range(1, 9)
    ]
    assert shade[:4] == pytest.approx(shade[4:], abs=0.5) and np.all(np.diff(shade[:4]) > 0.5)
    for i, place in enumerate(PLACES):
        centres = [np.argwhere(labels == i + 1).mean(0)[1:] / 96 for _, labels in cases if (labels == i + 1).any()]
        assert np.mean(centres, axis=0) == pytest.approx(np.array(place), abs=0.08)
    assert (make_organs(0)[0] == cases[0][0]).all() and (cases[1][0] != cases[0][0]).any()
