"""What imports what: the loss stands alone, nnU-Net's part knows no command, and only the command line is one."""

import ast
import configparser
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    **{".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOT.glob("nnunet_lomix/**/*.py")},
    **{f"nnunet_lomix.trainers.{file.stem}": file for file in ROOT.glob("trainers/*.py")},
}
LOSS = [name for name in MODULES if name.startswith("nnunet_lomix.loss.")]
NNUNET = [name for name in MODULES if name.startswith("nnunet_lomix.nnunet.")]


def imported_names(module: str) -> Iterator[str]:
    """Full names of all that a module imports, within functions, too: of modules, and of what is taken from them."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # "from . import x" in the module a.b and in a/b/__init__.py (here named a.b.__init__) is from a and a.b
            base = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def is_part(name: str, *packages: str) -> bool:
    """Whether a full name is one of these packages or modules, or of something in them."""
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def is_exit(node: ast.AST) -> bool:
    """Whether a part of the code is ``raise SystemExit`` or a call of ``exit`` or ``sys.exit``."""
    if isinstance(node, ast.Raise):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return isinstance(raised, ast.Name) and raised.id == "SystemExit"
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("exit", "quit", "sys.exit", "os._exit")


def test_the_tests_below_see_the_modules_and_their_imports():
    assert {"nnunet_lomix.loss.lomix", "nnunet_lomix.loss.rules"} <= set(LOSS)
    assert {"nnunet_lomix.nnunet.results", "nnunet_lomix.nnunet.lookup.nnunet_lomix_trainers"} <= set(NNUNET)
    assert {"nnunet_lomix.cli", "nnunet_lomix.trainers.lomix", "nnunet_lomix.demo.steps"} <= set(MODULES)
    assert "nnunet_lomix.errors.LoMixError" in set(imported_names("nnunet_lomix.nnunet.datasets"))
    assert "click" in set(imported_names("nnunet_lomix.cli"))
    assert is_exit(ast.parse("raise SystemExit('no') from None").body[0])
    assert is_exit(ast.parse("sys.exit(1)").body[0].value)
    assert not is_exit(ast.parse("raise ValueError").body[0])


def test_the_networks_know_neither_nnunet_nor_a_command():
    networks = [name for name in MODULES if name.startswith("nnunet_lomix.networks.")]
    assert len(networks) > 3
    for name in networks:
        own = {"nnunet_lomix.networks", "nnunet_lomix.errors"}
        known = {
            n
            for n in imported_names(name)
            if is_part(n, "nnunetv2") or (is_part(n, "nnunet_lomix") and not is_part(n, *own))
        }
        assert not known, (name, known)


def test_importing_the_loss_imports_torch_and_no_other_library():
    code = (
        "import json, sys, torch; before = set(sys.modules); import nnunet_lomix.loss;"
        "print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))"
    )
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True, timeout=120)
    by_torch, by_loss = json.loads(result.stdout)
    assert "nnunet_lomix.loss.lomix" in by_loss
    assert {name.partition(".")[0] for name in by_loss} - sys.stdlib_module_names - {"torch"} == {"nnunet_lomix"}
    # nor does torch import any of these when it calls our entry point
    unwanted = {"nnunetv2", "click", "rich", "pandas", "scipy", "matplotlib", "monai", "SimpleITK", "joblib"}
    assert not unwanted & {name.partition(".")[0] for name in (*by_torch, *by_loss)}


@pytest.mark.parametrize("module", LOSS)
def test_the_loss_imports_torch_alone(module):
    own = ("nnunet_lomix.loss", "nnunet_lomix.errors", "torch")
    # the kernels, which are imported only where they run, and their launch
    if module in ("nnunet_lomix.loss.backends.kernels", "nnunet_lomix.loss.backends.fused"):
        own = (*own, "triton")
    for name in imported_names(module):
        assert is_part(name, *own) or name.partition(".")[0] in sys.stdlib_module_names, name


@pytest.mark.parametrize("module", NNUNET)
def test_what_knows_nnunet_knows_no_command(module):
    shared = ("nnunet_lomix.nnunet", "nnunet_lomix.errors", "nnunet_lomix.files", "nnunet_lomix.loss")
    # nnU-Net's look-up imports this one, which hands over the trainers
    if module == "nnunet_lomix.nnunet.lookup.nnunet_lomix_trainers":
        shared = (*shared, "nnunet_lomix.trainers")
    for name in imported_names(module):
        assert is_part(name, *shared) or not is_part(name, "nnunet_lomix"), name


def test_only_its_own_folder_and_trainers_import_nnunet():
    users = [m for m in MODULES if any(is_part(name, "nnunetv2") for name in imported_names(m))]
    assert len(users) > 5
    allowed = ("nnunet_lomix.nnunet", "nnunet_lomix.trainers", "nnunet_lomix.demo.trainers_folder")
    assert [m for m in users if not is_part(m, *allowed)] == []


def test_each_library_that_is_imported_is_required():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(re.findall(r"^([A-Za-z0-9_-]+)", config["options"]["install_requires"], re.MULTILINE))
    imported_as = {"pyyaml": "yaml", "pillow": "PIL", "scikit-image": "skimage"}
    required = {imported_as.get(name, name) for name in listed}
    imported = {name.partition(".")[0] for module in MODULES for name in imported_names(module)}
    come_with = {"markupsafe", "triton"}  # with jinja2, and with torch where it supports Triton
    assert imported - sys.stdlib_module_names - come_with - {"nnunet_lomix"} == required


def test_only_the_command_line_imports_click():
    users = [m for m in MODULES if any(is_part(name, "click", "rich_click") for name in imported_names(m))]
    assert users == ["nnunet_lomix.cli"]


def test_only_the_command_line_and_the_trainers_end_the_process():
    enders = [m for m, file in MODULES.items() if any(map(is_exit, ast.walk(ast.parse(file.read_text()))))]
    # the last one is a program, which becomes nnU-Net's
    allowed = ("nnunet_lomix.cli", "nnunet_lomix.trainers", "nnunet_lomix.experiments.job")
    assert [m for m in enders if not is_part(m, *allowed)] == []
