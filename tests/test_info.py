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
    assert f"switches the registration off; mend it with: export nnUNet_extTrainer={FOLDER}\n" in result.stdout


def test_a_class_of_the_user_hides_ours(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from nnunet_lomix import trainers\nclass nnUNetTrainerLoMixPaper(trainers.nnUNetTrainerLoMix): pass\n"
    )
    result = info(tmp_path, nnUNet_extTrainer=str(tmp_path))
    assert result.returncode == 1
    assert "A class of the same name in mine comes first; rename it.\n" in result.stdout


def test_the_trainers_of_the_user_are_listed_or_why_not(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from nnunet_lomix import trainers\n"
        "class nnUNetTrainerMine(trainers.nnUNetTrainerLoMix):\n    'Only sums.\\n\\n    And more.'\n"
        "class nnUNetTrainerBN(trainers.nnUNetTrainerLoMix): pass\n"
    )
    result = info(tmp_path, nnUNet_extTrainer=str(tmp_path), COLUMNS="200")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["nnUNetTrainerMine", "Only", "sums.", "found"] in rows
    # nnU-Net has one of this name, which comes first
    assert ["nnUNetTrainerBN", "not", "found"] in rows
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
