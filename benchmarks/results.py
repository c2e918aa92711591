"""The results of a benchmark: JSON with all that is needed to repeat it.

A file has the rows, whose values are numbers, or the median and percentiles of a number; and the benchmark, its
options, the machine, the versions, the commit and the date.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from nnunet_lomix.files import replacing

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "nnunetv2", "nnunet_lomix")
MEASURED_CODE = ("nnunet_lomix", "trainers", "benchmarks/*.py")  # what else has changed matters to no time
MEDIAN, LOW, HIGH = ".median", ".p20", ".p80"

Rows = list[dict[str, Any]]
Record = dict[str, Any]


def make_record(benchmark: str, rows: Rows, device: str | None, options: Mapping[str, object]) -> Record:
    """What is written: the rows of a benchmark that has just run, and the circumstances."""
    return {
        "benchmark": benchmark,
        "options": dict(options),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        **describe_commit(),
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "rows": rows,
    }


def describe_commit() -> dict[str, object]:
    """The commit, and whether the measured code differed from it; None and None outside a clone."""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--", *MEASURED_CODE))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _git(*args: str) -> str:
    root = Path(__file__).parents[1]
    return subprocess.run(["git", *args], cwd=root, check=True, capture_output=True, text=True).stdout


def describe_machine(device: str | None) -> dict[str, object]:
    """Names of the processor and, if it is the device, the GPU; the cores, and the threads that torch uses."""
    return {
        "device": device,
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def _processor() -> str:
    """Its name; Python knows it on some systems, Linux has a file for it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_versions() -> dict[str, str | None]:
    """Those of Python and of the packages that a time depends on; None for one that isn't installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def write_record(record: Record, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def read_record(path: Path) -> Record:
    return json.loads(path.read_text())


def as_table(record: Record) -> pd.DataFrame:
    """The rows. The parts of a spread are columns: ``full_ms.median``, ``full_ms.p20`` and ``full_ms.p80``."""
    return pd.json_normalize(record["rows"])
