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
