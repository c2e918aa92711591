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
    """Where the output isn't UTF-8, too: a summary has a minus sign, which Windows' western encoding lacks."""
    result = info(tmp_path, COLUMNS="200", PYTHONIOENCODING="cp1252")
    assert result.returncode == 0 and not result.stderr
    assert result.stdout.count(" found") == len(trainers.TRAINERS)
    assert all(name in result.stdout for name in ("nnunetv2", "torchvision", "0.7 (1 ? Dice)", *trainers.__all__))


def test_registration_is_switched_off(tmp_path):
    result = info(tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.returncode == 1
    (advice,) = {line for line in result.stdout.splitlines() if "switches the registration off; mend it with: " in line}
    # the folders of the user stay, and none is empty
    for before, after in {"": FOLDER, "/mine": f"/mine:{FOLDER}"}.items():
        shell = f'{advice.partition("with: ")[2]}; printf %s "$nnUNet_extTrainer"'
        done = subprocess.run(["sh", "-c", shell], env={"nnUNet_extTrainer": before}, text=True, capture_output=True)
        assert done.stdout == after


def test_variables_that_are_not_set_and_trainers_of_the_user_are_told_and_nothing_is_cut(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from nnunet_lomix import trainers\n"
        "class nnUNetTrainerMine(trainers.nnUNetTrainerLoMix):\n    'Only sums.\\n\\n    And more.'\n"
        "class nnUNetTrainerBN(trainers.nnUNetTrainerLoMix): pass\n"
        "class nnUNetTrainerLoMixPaper(trainers.nnUNetTrainerLoMix): pass\n"
    )
    variables = {"nnUNet_raw": str(tmp_path), "nnUNet_results": f"{tmp_path}/no", "nnUNet_preprocessed": ""}
    result = info(tmp_path, COLUMNS="30", nnUNet_extTrainer=str(tmp_path), **variables)
    assert result.returncode == 1
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in result.stdout.splitlines() if " " in line.strip()}
    assert lines["nnUNet_raw"] == str(tmp_path) and lines["nnUNet_results"] == f"{tmp_path}/no (not there)"
    assert lines["nnUNet_preprocessed"].startswith("not set, though nnU-Net's commands need it: export nnUNet_prep")
    assert "…" not in result.stdout and all(trainer.__name__ in result.stdout for trainer in trainers.TRAINERS)
    assert "\nnnUNetTrainerMine found\n  Only sums.\n" in result.stdout
    # nnU-Net has one of this name, which comes first; and it takes a class of the user for ours
    assert "\nnnUNetTrainerBN not found\n" in result.stdout
    said = " ".join(result.stdout.split())
    assert "nnU-Net takes nnUNetTrainerBN of nnunetv2.training.nnUNetTrainer." in said
    ours = trainers.nnUNetTrainerLoMixPaper.__module__
    assert f"nnU-Net takes nnUNetTrainerLoMixPaper of mine for that of {ours}: rename one of them." in said


def test_a_file_of_the_user_that_cannot_be_imported(tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_package")
    result = info(tmp_path, nnUNet_extTrainer=str(tmp_path), COLUMNS="200")
    why = "ModuleNotFoundError: No module named 'no_such_package'"
    assert f"{tmp_path / 'mine.py'} can't be imported, and nnU-Net's look-up stops there: {why}" in result.stdout
    assert result.returncode == 1
