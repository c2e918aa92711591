"""The demo: from nothing to a comparison of two trainers, by nnU-Net's own commands.

Each step leaves its output below one folder and is skipped when that is there, so a second call goes on
where the first one stopped.
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from nnunet_lomix.demo.steps import Settings, Steps
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.files import replacing
from nnunet_lomix.locks import NAME as LOCK
from nnunet_lomix.locks import Lock
from nnunet_lomix.nnunet.results import read_json

__all__ = ["DEFAULTS", "Settings", "default_settings", "run_demo"]

SETTINGS_FILE = "demo.json"
DEFAULTS = {
    2: Settings(dim=2, epochs=12, iterations=80, size=64, train_cases=80, test_cases=20, slimming=2),
    3: Settings(dim=3, epochs=10, iterations=40, size=40, train_cases=25, test_cases=10, slimming=4),
}


def default_settings(dim: int, epochs: int | None = None) -> Settings:
    """What takes some minutes on two cores; or with other ``epochs``."""
    return DEFAULTS[dim] if epochs is None else replace(DEFAULTS[dim], epochs=epochs)


def run_demo(out: str | Path, settings: Settings, console: Console | None = None) -> None:
    """Generate data, plan, train both trainers, predict the held-out cases, report; skip what is there.

    Args:
        out: folder for everything that is written.
        settings: how large the demo is.
        console: where the progress and the table are printed.

    Raises:
        LoMixError: ``out`` belongs to something else or to a demo with other settings; a command of nnU-Net
            failed; interrupted.
    """
    console = console or Console()
    out = Path(os.path.realpath(out))  # which, unlike resolve, raises nothing for a link that leads to itself
    with claim_folder(out, settings):
        steps = Steps(out, settings, find_device())
        console.print(f"LoMix demo in {settings.dim}D on {steps.device}, below {out}", soft_wrap=True, markup=False)
        try:
            steps.run(console)
            steps.report(console)
        except KeyboardInterrupt:
            raise LoMixError("Interrupted; the same command goes on where it stopped.") from None


def claim_folder(out: Path, settings: Settings) -> Lock:
    """Note the settings in ``out``, or check that they are those of the demo that is there.

    Returns:
        The lock of the folder.

    Raises:
        LoMixError: ``out`` belongs to something else, to a demo of the same ``dim`` with other settings, or to a demo
            that runs.
    """
    file, wanted = out / SETTINGS_FILE, asdict(settings)
    if out.is_dir() and {entry.name for entry in out.iterdir()} - {LOCK} and not file.is_file():
        raise LoMixError(f"{out} is not empty and not the folder of a demo: choose another --out.")
    try:
        lock = Lock(out, "demo")
        demos = read_json(file) if file.is_file() else {}
        found = demos.setdefault(f"{settings.dim}D", wanted)
        for name, value in wanted.items():
            noted = found.get(name) if isinstance(found, dict) else found
            if noted != value:
                raise LoMixError(
                    f"{file} is of a {settings.dim}D demo with {name} = {noted}, not {value}: choose another --out, or "
                    "delete that folder."
                )
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(demos, indent=4))
    except OSError as error:
        raise LoMixError(f"{out} can't be written ({error.strerror}): choose another --out.") from None
    return lock


def find_device() -> str:
    """What nnU-Net's ``-device`` can be here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
