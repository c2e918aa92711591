"""``nnunet_lomix info`` tells what nnU-Net finds, and why not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_lomix import trainers
from nnunet_lomix.nnunet.registration import FOLDER

pytestmark = pytest.mark.end_to_end


def info(tmp_path, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "nnUNet_extTrainer"} | variables
    command = [Path(sys.executable).parent / "nnunet_lomix", "info"]
    return subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True)


def test_all_is_well(tmp_path):
    result = info(tmp_path, COLUMNS="200")
    assert result.returncode == 0
    assert result.stdout.count(" found") == len(trainers.TRAINERS)
    assert all(name in result.stdout for name in ("nnunetv2", "torchvision", *trainers.__all__))


def test_registration_is_switched_off(tmp_path):
    result = info(tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.returncode == 1
    (advice,) = {line for line in result.stdout.splitlines() if "switches the registration off; mend it with: " in line}
    # the folders of the user stay, and none is empty
    for before, after in {"": FOLDER, "/mine": f"/mine:{FOLDER}"}.items():
        shell = f'{advice.partition("with: ")[2]}; printf %s "$nnUNet_extTrainer"'
        done = subprocess.run(["sh", "-c", shell], env={"nnUNet_extTrainer": before}, text=True, capture_output=True)
        assert done.stdout == after


def test_variables_that_are_not_set_are_named_and_nothing_is_cut(tmp_path):
    result = info(
        tmp_path, COLUMNS="30", nnUNet_raw=str(tmp_path), nnUNet_results=f"{tmp_path}/no", nnUNet_preprocessed=""
    )
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in result.stdout.splitlines() if " " in line.strip()}
    assert lines["nnUNet_raw"] == str(tmp_path) and lines["nnUNet_results"] == f"{tmp_path}/no (not there)"
    assert lines["nnUNet_preprocessed"].startswith("not set, though nnU-Net's commands need it: export nnUNet_prep")
    assert "…" not in result.stdout and all(trainer.__name__ in result.stdout for trainer in trainers.TRAINERS)


def test_a_class_of_the_user_hides_ours(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from nnunet_lomix import trainers\nclass nnUNetTrainerLoMixPaper(trainers.nnUNetTrainerLoMix): pass\n"
    )
    result = info(tmp_path, nnUNet_extTrainer=str(tmp_path))
    assert result.returncode == 1
    ours = trainers.nnUNetTrainerLoMixPaper.__module__
    assert f"nnU-Net takes nnUNetTrainerLoMixPaper of mine for that of {ours}: rename one of them.\n" in result.stdout


def test_the_trainers_of_the_user_are_listed_or_why_not(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from nnunet_lomix import trainers\n"
        "class nnUNetTrainerMine(trainers.nnUNetTrainerLoMix):\n    'Only sums.\\n\\n    And more.'\n"
        "class nnUNetTrainerBN(trainers.nnUNetTrainerLoMix): pass\n"
    )
    result = info(tmp_path, nnUNet_extTrainer=str(tmp_path), COLUMNS="200")
    assert "\nnnUNetTrainerMine found\n  Only sums.\n" in result.stdout
    # nnU-Net has one of this name, which comes first
    assert "\nnnUNetTrainerBN not found\n" in result.stdout
    assert "nnU-Net takes nnUNetTrainerBN of nnunetv2.training.nnUNetTrainer." in result.stdout
    assert result.returncode == 1
    (tmp_path / "mine.py").write_text("import no_such_package")
    result = info(tmp_path, nnUNet_extTrainer=str(tmp_path), COLUMNS="200")
    why = "ModuleNotFoundError: No module named 'no_such_package'"
    assert f"{tmp_path / 'mine.py'} can't be imported, and nnU-Net's look-up stops there: {why}" in result.stdout
    assert result.returncode == 1


def test_an_output_that_is_not_utf_8(tmp_path):
    """The summary of a trainer has a minus sign, which Windows' encoding of western Europe lacks."""
    result = info(tmp_path, PYTHONIOENCODING="cp1252", COLUMNS="200")
    assert result.returncode == 0 and not result.stderr
    assert "0.7 (1 ? Dice)" in result.stdout
