"""nnU-Net finds the trainers in any process, beside those of the user."""

import json
import os
import subprocess
import sys

import pytest

from nnunet_lomix.nnunet import registration

SHOW = "import torch, os, json; print(json.dumps(os.environ.get('nnUNet_extTrainer')))"
LOOK_UP = """
import contextlib, io, pickle, sys, torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
def find(name):
    with contextlib.redirect_stdout(io.StringIO()):
        return recursive_find_trainer_class_by_name(name)
"""


def python(code, tmp_path, **variables):
    """Run code in a new process, in an unrelated working directory, without our folder in the environment."""
    environment = {k: v for k, v in os.environ.items() if k != registration.VARIABLE} | variables
    (tmp_path / "code.py").write_text(code)
    return subprocess.run(
        [sys.executable, "code.py"], env=environment, cwd=tmp_path, text=True, capture_output=True, timeout=120
    )


def test_import_torch_registers_the_folder_behind_the_users(tmp_path):
    assert json.loads(python(SHOW, tmp_path).stdout) == registration.FOLDER
    folders = json.loads(python(SHOW, tmp_path, nnUNet_extTrainer="/of/the/user").stdout)
    assert folders.split(os.pathsep) == ["/of/the/user", registration.FOLDER]


def test_registration_is_idempotent_and_can_be_switched_off(tmp_path):
    once = python(SHOW, tmp_path, nnUNet_extTrainer=registration.FOLDER).stdout
    assert json.loads(once) == registration.FOLDER
    assert json.loads(python(SHOW, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout) is None


def test_registration_never_raises(monkeypatch):
    class Full(dict):
        def __setitem__(self, key, value):
            raise OSError("no space")

    with monkeypatch.context() as patch:  # pytest itself writes to the environment
        patch.setattr(os, "environ", Full())
        registration.register()
        assert os.environ == {}


def test_registration_imports_nothing_but_itself(tmp_path):
    """Every ``import torch`` of the environment loads the entry point, so it must cost next to nothing."""
    code = """
import importlib.metadata, json, os, sys
[entry] = [e for e in importlib.metadata.entry_points(group="torch.backends") if e.name == "nnunet_lomix"]
before = set(sys.modules)
entry.load()()
print(json.dumps([sorted(set(sys.modules) - before), os.environ["nnUNet_extTrainer"]]))
"""
    modules, folder = json.loads(python(code, tmp_path).stdout)
    assert modules == ["nnunet_lomix", "nnunet_lomix.nnunet", "nnunet_lomix.nnunet.registration"]
    assert folder == registration.FOLDER


@pytest.mark.end_to_end
def test_every_lookup_gives_the_same_class_and_subclasses_of_users_are_found(tmp_path):
    """A typo gets one sentence with the remedy; other names are left to nnU-Net."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text(
        "from nnunet_lomix.loss.operators import OPERATORS, Operator\n"
        "from nnunet_lomix.trainers import nnUNetTrainerLoMix\n"
        "@OPERATORS.register('first')\n"
        "class First(Operator):\n    def mix(self, scales, number): return scales[0]\n"
        "class nnUNetTrainerLoMixMine(nnUNetTrainerLoMix):\n    share, operators = 0.7, ('first',)\n"
    )
    typos = ["nnUNetTrainerLoMx", "nnUNetTrainerLoMix_5epoch_", "nnUNetTrainerLoMix_epochs"]
    code = f"""{LOOK_UP}
import nnunet_lomix.trainers
def worker(rank):
    assert find("nnUNetTrainerLoMix_7epochs").epochs == 7
if __name__ == "__main__":
    for trainer in nnunet_lomix.trainers.TRAINERS:
        for name in (trainer.__name__, trainer.__name__ + "_3epochs"):
            found = find(name)
            assert found is find(name) and issubclass(found, trainer)
            assert pickle.loads(pickle.dumps(found)) is found
    find("nnUNetTrainerLoMixMine")
    mine = find("nnUNetTrainerLoMixMine")  # nnU-Net imports the file again, which registers the operator again
    assert mine.share == 0.7 and issubclass(mine, find("nnUNetTrainerLoMix"))
    torch.multiprocessing.spawn(worker, nprocs=1)
    for name in {typos}:
        try:
            find(name)
        except SystemExit as sentence:
            print(sentence)
    find("nnUNetTrainerMedNeXt")
"""
    result = python(code, tmp_path, nnUNet_extTrainer=str(folder))
    assert result.stdout.count("Did you mean 'nnUNetTrainerLoMix'?") == len(typos), result.stderr
    assert "Could not find requested nnunet trainer nnUNetTrainerMedNeXt" in result.stderr


@pytest.mark.end_to_end
def test_a_process_without_the_package_that_inherits_the_variable_is_not_disturbed(tmp_path):
    code = f"""
import sys

class NotInstalled:
    def find_spec(name, path=None, target=None):
        if name == "nnunet_lomix":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, NotInstalled)
{LOOK_UP}
find("nnUNetTrainerOfSomebody")
"""
    result = python(code, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0", nnUNet_extTrainer=registration.FOLDER)
    assert "Could not find requested nnunet trainer nnUNetTrainerOfSomebody" in result.stderr
