"""What an installation consists of, and what Python finds where."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nnunet_lomix

ROOT = Path(__file__).parents[1]
FOLDERS = {"nnunet_lomix": ROOT / "nnunet_lomix", "nnunet_lomix.trainers": ROOT / "trainers"}
WHERE = """
import importlib.util, json, nnunet_lomix
print(json.dumps([nnunet_lomix.__path__, importlib.util.find_spec("nnunet_lomix.trainers").origin]))
"""


def shipped_files() -> dict[str, Path]:
    """Each file that an installation needs, by its path there."""
    files = (
        (Path(*package.split("."), file.relative_to(folder)), file)
        for package, folder in FOLDERS.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    )
    return {path.as_posix(): file for path, file in files}


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def python(code: str, folder: Path) -> str:
    """Run code in a new process that is started in a folder, where Python looks for modules first."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, text=True, capture_output=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def clone(tmp_path) -> Path:
    """The files of this repository that an installation is made from, in a folder of their own."""
    folder = tmp_path / "clone"
    for name in ("nnunet_lomix", "trainers"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_each_folder_with_modules_is_listed_as_a_package():
    folders = {Path(path).parent.as_posix() for path in shipped_files() if path.endswith(".py")}
    listed = setup_cfg()["options"]["packages"].split()
    assert sorted(listed) == sorted(folder.replace("/", ".") for folder in folders)


def test_a_wheel_has_all_files_and_no_others_and_the_trainers_under_their_installed_name(clone, tmp_path):
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(installed)
    assert packed == set(shipped_files())
    # some by name, so that an empty folder doesn't pass
    assert {
        "nnunet_lomix/py.typed",
        "nnunet_lomix/compare/report.html",
        "nnunet_lomix/nnunet/lookup/nnunet_lomix_trainers.py",
        "nnunet_lomix/demo/trainers_folder/demo_trainers.py",
        "nnunet_lomix/trainers/lomix.py",
    } <= packed
    # an installation has all in one folder
    path, trainers = json.loads(python(WHERE, installed))
    assert path == [str(installed / "nnunet_lomix")]
    assert trainers == str(installed / "nnunet_lomix" / "trainers" / "__init__.py")


def test_python_started_in_the_folder_of_a_clone_finds_its_trainers(clone):
    path, trainers = json.loads(python(WHERE, clone))
    assert path == [str(clone / "nnunet_lomix"), str(clone)]
    assert trainers == str(clone / "trainers" / "__init__.py")


def test_one_version_of_the_package_and_of_ruff():
    (version,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version == nnunet_lomix.__version__
    assert re.search(rf"^## {re.escape(version)} ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    (ruff,) = re.findall(
        r"ruff-pre-commit\n\s+rev: v(\S+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE
    )
    assert f"ruff=={ruff}" in setup_cfg()["options.extras_require"]["test"].split()


def test_the_python_versions_that_are_named_and_tested_are_the_same():
    named = re.findall(r"Python :: (3\.\d+)$", setup_cfg()["metadata"]["classifiers"], re.MULTILINE)
    (tested,) = re.findall(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert re.findall(r'"(.+?)"', tested) == [named[0], named[-1]]
    assert setup_cfg()["options"]["python_requires"] == f">={named[0]}"
