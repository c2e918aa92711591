"""The demo: its data, its numbers, its refusals, and once all of it."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from rich.console import Console

from nnunet_lomix import demo
from nnunet_lomix.cli import main
from nnunet_lomix.demo import data, steps
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.locks import NAME
from nnunet_lomix.nnunet.results import FoldFolder

NAMES = {"nnUNetTrainerDemo": "nnUNetTrainer", "nnUNetTrainerLoMixDemo": "nnUNetTrainerLoMix"}
SMALLEST = demo.Settings(dim=2, epochs=3, iterations=2, size=64, train_cases=10, test_cases=3, slimming=8)


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


@pytest.mark.parametrize("content", ["{", "[]", '{"2D": 3}', pytest.param("[" * 100_000, id="nested")])
def test_damaged_settings_are_named(tmp_path, content):
    (tmp_path / "demo.json").write_text(content)
    assert "demo.json " in call("--out", tmp_path)


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


@pytest.mark.end_to_end
def test_an_interrupted_demo_goes_on(tmp_path, monkeypatch):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.delenv(variable, raising=False)
    out = tmp_path / "a demo[/b]"  # which rich takes for the end of a style
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

    log = tmp_path / "log"
    with log.open("w") as file:
        demo.run_demo(out, SMALLEST, Console(file=file))
    said = [line for line in log.read_text().splitlines() if " of " in line]
    # not a terminal: lines, and not bars alone at the end
    assert (
        said[:2] == ["Generate images: 0 of 13", "Generate images: 13 of 13"]
        and "Predict held-out cases: 1 of 1" in said
    )
    assert "Train both trainers, epochs: 6 of 6" in said
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
