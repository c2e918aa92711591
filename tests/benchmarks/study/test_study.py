"""The study's own parts: what it compares, and how it counts."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from torch import nn

from nnunet_lomix.nnunet.datasets import read_splits

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
            for arm, dice in (("nnUNetTrainer", base), ("better", base + gain)):
                rows += [(*key, arm, seed, f"p{case // 2}_frame0{case % 2}", c, dice + c / 100) for c in (1, 2)]
    rows += [(*key, "better", 3, f"p{c}_frame00", 1, 0.0) for c in range(12)]  # nnUNetTrainer lacks this seed
    dice = pd.DataFrame(rows, columns=["dataset", "size", "steps", "optimiser", "arm", "seed", "case", "class", "dice"])
    (table,) = report.summarise(dice.sample(frac=1, random_state=0)).values()
    table = table.set_index("arm").loc["better"]
    assert float(table["difference"]) == pytest.approx(np.mean(truth), abs=0.006)
    by_seed = np.reshape(truth, (3, 24)).mean(1)
    assert [float(d) for d in table["by seed"].split(", ")] == pytest.approx(by_seed, abs=0.06)
    assert table["seeds"] == 3
    # wider than over cases alone, since seeds differ, but between the seeds
    low, high = map(float, table["95 % interval"].split(" to "))
    assert by_seed.min() - 0.5 < low < np.mean(truth) - 0.5 and np.mean(truth) + 0.5 < high < by_seed.max() + 0.5

    (turned,) = report.summarise(dice, "better").values()
    turned = turned.set_index("arm").loc["nnUNetTrainer"]
    assert float(turned["difference"]) == -float(table["difference"])

    alone = report.summarise(dice[dice["seed"] == 0])
    assert next(iter(alone.values())).set_index("arm").loc["better", "95 % interval"] == ""


def test_every_arm_is_a_trainer_that_differs_from_its_base_only_as_it_says() -> None:
    import arms

    for name, (base, differences) in arms.ARMS.items():
        trainer = getattr(arms, f"Study{name}")
        assert issubclass(trainer, base) and issubclass(trainer, arms.Short)
        known = {*dir(base), *dir(arms.Short)}
        assert all(getattr(trainer, key) == value and key in known for key, value in differences.items())
    with pytest.raises(AttributeError):
        arms.StudyUnknown  # noqa: B018


@pytest.mark.parametrize("arm, trainer", [("stride_2", "nnUNetTrainerLoMix"), ("Paper", "nnUNetTrainerLoMixPaper")])
def test_nnunet_finds_an_arm_again_and_again(arm: str, trainer: str) -> None:
    """nnU-Net imports arms.py anew each time."""
    for _ in range(2):
        folder = str(STUDY / "study_trainers")
        found = recursive_find_python_class(folder, f"Study{arm}", None, cleanup_imports_from_base_folder=True)
        assert [cls.__name__ for cls in found.mro()][1:3] == ["Short", trainer]


@pytest.mark.parametrize("factor", [1, 13])
def test_the_whole_loss_has_the_factor_of_the_arm(factor: float) -> None:
    import arms

    class Base:
        def _build_loss(self) -> nn.Module:
            return nn.L1Loss()

    trainer = type("Trainer", (arms.Short, Base), {"factor": factor})
    loss = trainer._build_loss(object.__new__(trainer))
    output = torch.tensor([3.0], requires_grad=True)
    loss(output, torch.tensor([1.0])).backward()
    assert loss(output, torch.tensor([1.0])) == 2 * factor and output.grad == factor


def test_terms_of_nnunets_own_loss_have_the_weights_of_the_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    import arms

    z, target = [torch.randn(2, 3, n, n) for n in (8, 4)], [torch.randint(3, (2, 1, n, n)) for n in (8, 4)]

    def build(trainer: object) -> nn.Module:
        dice = {"batch_dice": False, "do_bg": False, "smooth": 1e-5, "ddp": False}
        return DeepSupervisionWrapper(DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss), (0.7, 0.3))

    monkeypatch.setattr(arms.nnUNetTrainer, "_build_loss", build)
    wrapper = build(None)
    expected = 0
    for weight, *inputs in zip(wrapper.weight_factors, z, target, strict=True):
        wrapper.loss.weight_ce, wrapper.loss.weight_dice = 1, 0
        expected += weight * 13 * 0.3 * wrapper.loss(*inputs)
        wrapper.loss.weight_ce, wrapper.loss.weight_dice = 0, 1
        expected += weight * 13 * 0.7 * wrapper.loss(*inputs)
    trainer = arms.StudynnUNetTrainer_paper_terms_x13
    torch.testing.assert_close(trainer._build_loss(object.__new__(trainer))(z, target), expected)


@pytest.mark.end_to_end
def test_a_study_from_raw_images_to_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import generated
    import study

    monkeypatch.setattr(generated, "CASES", 6)
    monkeypatch.setattr(study, "EPOCHS", 2)
    monkeypatch.setattr(study, "PIXELS", 2 * 64 * 64)
    options = ["--out", str(tmp_path), "--arms", "nnUNetTrainer,stride_2", "--sizes", "scarce"]
    options += ["--datasets", "Dataset900_Planted", "--seeds", "1", "--steps", "10"]
    result = CliRunner().invoke(study.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output

    dice, curves, weights = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("dice", "curves", "weights"))
    key = {"dataset": "Dataset900_Planted", "size": "scarce", "seed": 1, "steps": 10, "optimiser": "adamw"}
    assert all((table[name] == value).all() for table in (dice, curves, weights) for name, value in key.items())
    _, *scarce = read_splits(tmp_path / "preprocessed" / "Dataset900_Planted")
    assert len(scarce) == study.MOST_SEEDS and len(scarce[1]["train"]) == 2
    for arm in ("nnUNetTrainer", "stride_2"):
        assert dice.loc[dice["arm"] == arm, "case"].tolist() == scarce[1]["val"]
        of_arm = curves[curves["arm"] == arm]
        assert of_arm["epoch"].tolist() == [0, 1] and (of_arm["seconds"] > 0).all()
    assert dice["dice"].between(0, 1).all() and curves["train_loss"].nunique() == 4
    assert set(weights["arm"]) == {"stride_2"} and weights["weight"].sum() == pytest.approx(1, abs=1e-3)
    (fold,) = tmp_path.glob("results/seed_1_10_steps_adamw/*/Studystride_2__nnUNetPlans__2d_study/fold_2")
    assert not [*fold.glob("*.pth")] and (fold / "lomix_weights.csv").is_file()
    table = (tmp_path / "table.md").read_text()
    assert table in result.output and "### Dataset900_Planted, scarce, 10 steps of adamw" in table

    monkeypatch.setattr(study.Study, "train_alone", lambda self, run: pytest.fail(f"{run} is trained again"))
    again = CliRunner().invoke(study.main, options, catch_exceptions=False)
    assert again.exit_code == 0 and table in again.output


def test_nothing_is_started_that_may_end_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    import study

    seconds = iter([0, 0, 10, 12, 18, 19, 30])
    monkeypatch.setattr(study, "perf_counter", lambda: next(seconds))
    clock, done = study.Clock(25), []
    assert [clock.time(done.append, i) for i in range(3)] == [True, True, False]  # 19 + 10 seconds are too late
    assert done == [0, 1]


def touch(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.touch()


def test_one_process_is_told_all_that_its_trainings_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import study

    told: dict[str, str] = {}

    def run(command: list[object], log: Path, variables: dict[str, str]) -> None:
        told.update(variables)
        log.write_text(
            "much else\nStudyx has ended: a sentence\nTrained 1 runs, 0 of them on graphs: 2.0 steps a second\n"
        )

    monkeypatch.setattr(study, "run_command", run)
    monkeypatch.setattr(study, "read_splits", lambda folder: [{}] * (1 + study.MOST_SEEDS))
    runs = [study.Run("D", size, "x", 3, 20, "sgd") for size in ("full", "scarce")]
    study.Study(tmp_path, "cuda").train_chunk(runs)
    job = json.loads((tmp_path / "side_by_side.json").read_text())
    assert job["device"] == "cuda" and [run["fold"] for run in job["runs"]] == [0, 4]  # numbers, as nnU-Net wants them
    assert job["runs"][0]["budget"] == {"seed": 3, "epochs": 10, "iterations": 2, "optimiser": "sgd"}
    # compiled for a minute each, validations would take longer than trainings, on the GPU that trains
    assert told["nnUNet_compile"] == "f" and told["nnUNet_n_proc_DA"] == "0"


def test_side_by_side_are_runs_of_one_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import study

    chunks: list[list[study.Run]] = []
    validated: list[study.Run] = []

    def train(self: study.Study, runs: list[study.Run]) -> None:
        chunks.append(runs)
        for run in runs:
            if run.arm != "w":  # this one couldn't go on
                touch(self.fold_folder(run).path / "checkpoint_final.pth")

    monkeypatch.setattr(study.Study, "train_chunk", train)
    monkeypatch.setattr(study, "read_splits", lambda folder: [{}])
    monkeypatch.setattr(study.Study, "validate", lambda self, run: validated.append(run))
    runs = [study.Run(d, "full", arm, seed, 10, "sgd") for seed in range(2) for d in "AB" for arm in "vwxyz"]
    own = study.Study(tmp_path, "cuda")
    touch(own.fold_folder(runs[0]).path / "checkpoint_final.pth")  # trained before, but not validated
    with ThreadPoolExecutor(1) as pool:
        tasks = list(own.train_side_by_side(runs, 4, study.Clock(1e9), pool))
    # seed by seed, so that a deadline cuts off seeds
    assert [[(run.dataset, run.seed, run.arm) for run in chunk] for chunk in chunks] == [
        [("A", 0, arm) for arm in "wxyz"],
        *([(d, seed, arm) for arm in arms] for d, seed in (("B", 0), ("A", 1), ("B", 1)) for arms in ("vwxy", "z")),
    ]
    assert all(task.result() for task in tasks) and validated[0] == runs[0]
    assert set(validated) == {run for run in runs if run.arm != "w"}


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
