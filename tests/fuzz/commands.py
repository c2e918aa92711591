"""The commands in the small setting, and what each of them promises whatever it is given."""

import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from click.testing import CliRunner, Result
from hypothesis import HealthCheck, Phase, settings
from joblib import parallel_config

from nnunet_lomix.cli import main

from .world import DATASET, MODELS, TRAINERS, UNTABLED, inside

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
FUZZ = settings(
    max_examples=EXAMPLES or 6,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a smaller example would cost as many calls again
)
SECONDS = 120  # the slowest of these commands takes two, on a machine that has nothing else to do
COUNTS: Counter[tuple[str, str]] = Counter()  # command, outcome


@dataclass(frozen=True)
class Call:
    """A call of a command that is accepted in the small setting.

    Attributes:
        arguments: of the command line, its name first.
        inputs: glob patterns of the files that it reads.
        out: the folder that it makes; None if it makes none.
        written: patterns of what is in it once the command has succeeded.
        changes: names of files of the setting that it may replace by others, which are whole.
    """

    arguments: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    out: str | None = None
    written: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.arguments[0]


REPORT = ("report.html", "report.md", "scores.csv", "comparison.json", "scores_cache.json")
MODEL_FILES = ("plans.json", "dataset.json", "fold_*/checkpoint_final.pth", "fold_*/validation/summary.json")
PREPARED = ("splits_final.json", "dataset.json", "nnUNetPlans.json")
IMAGE = f"raw/{DATASET}/imagesTr/a_0000.nii.gz"
CALLS = {
    "info": Call(("info",)),
    "demo": Call(("demo", "--dim", "2", "--out", "out", "--epochs", "1"), (), "out", ("demo.json",)),
    "splits": Call(
        ("splits", "-d", "9", "--train-cases", "2"),
        (f"preprocessed/{DATASET}/splits_final.json",),
        changes=("splits_final.json",),
    ),
    "convert": Call(
        ("convert", "synapse", "download"),
        ("download/RawData/Training/*/*.nii.gz",),
        "raw/Dataset601_Synapse",
        ("dataset.json", "splits_final.json", "imagesTr/case0001_0000.nii.gz", "labelsTr/case0040.nii.gz"),
    ),
    "weights": Call(
        ("weights", *MODELS[1:], "--out", "out"),
        (f"{MODELS[1]}/fold_*/lomix_weights.csv", f"preprocessed/{DATASET}/splits_final.json"),
        "out",
        ("weights.png", "weights.csv"),
    ),
    "weights of checkpoints": Call(
        ("weights", UNTABLED, "--out", "out"),
        (f"{UNTABLED}/fold_*/checkpoint_final.pth",),
        "out",
        ("weights.png", "weights.csv"),
    ),
    "export": Call(
        ("export", MODELS[1], "--out", "out"),
        tuple(f"{MODELS[1]}/{file}" for file in MODEL_FILES),
        "out",
        tuple(
            f"*/*/{file}" for file in ("plans.json", "dataset.json", "provenance.txt", "fold_*/checkpoint_final.pth")
        ),
    ),
    "export with a case": Call(
        ("export", MODELS[1], "--out", "out", "--case", IMAGE),
        (IMAGE, *(f"{MODELS[1]}/{file}" for file in MODEL_FILES)),
        "out",
        ("*/*/provenance.txt",),
    ),
    "status": Call(("status", "plan.yaml"), ("plan.yaml", f"{MODELS[1]}/fold_*/validation/summary.json")),
    "run": Call(
        ("run", "plan.yaml", "--dry-run"),
        ("plan.yaml", *(f"preprocessed/{DATASET}/{file}" for file in PREPARED)),
    ),
    "compare results": Call(
        ("compare", "-d", "9", "-c", "2d", "-tr", *TRAINERS, "--jobs", "1", "--out", "out"),
        (
            *(f"{model}/{file}" for model in MODELS for file in MODEL_FILES),
            f"{MODELS[1]}/fold_*/validation/*.nii.gz",
            f"preprocessed/{DATASET}/splits_final.json",
            f"preprocessed/{DATASET}/gt_segmentations/*",
            f"raw/{DATASET}/imagesTr/*",
        ),
        "out",
        REPORT,
    ),
    "compare folders": Call(
        ("compare", "--references", "nifti/references", "--predictions", "nifti/before", "nifti/after")
        + ("--jobs", "1", "--out", "out"),
        ("nifti/*/*.nii.gz", "nifti/before/dataset.json", f"raw/{DATASET}/imagesTr/*"),
        "out",
        REPORT,
    ),
    "compare TIFFs": Call(
        ("compare", "--references", "tiff/references", "--predictions", "tiff/before", "tiff/after")
        + ("--jobs", "1", "--out", "out"),
        ("tiff/*/*",),
        "out",
        REPORT,
    ),
    "compare pictures": Call(
        ("compare", "--references", "png/references", "--predictions", "png/before", "png/after")
        + ("--jobs", "1", "--out", "out"),
        ("png/*/*",),
        "out",
        REPORT,
    ),
}


def list_inputs(call: Call, folder: Path) -> list[Path]:
    return [file for pattern in call.inputs for file in sorted(folder.glob(pattern))]


@contextmanager
def copied(world: Path) -> Iterator[Path]:
    """A copy of the setting, to spoil."""
    memory = Path("/dev/shm")  # a disk that others use takes longer for the copy than the command for its work
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        yield shutil.copytree(world, Path(temporary, "world"), symlinks=True)


class Hang(BaseException):
    """The command has not ended in time."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise Hang(f"not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(arguments: Sequence[str], folder: Path) -> Result:
    """Run a command in this process, in a setting."""
    terminated = signal.getsignal(signal.SIGTERM)  # some commands have a handler of their own
    # the demo without its steps, which have tests of their own
    steps = mock.patch.multiple("nnunet_lomix.demo.Steps", run=mock.DEFAULT, report=mock.DEFAULT)
    machine = mock.patch.multiple(
        "nnunet_lomix.experiments.local.ThisMachine", submit=mock.DEFAULT
    )  # without trainings
    # --jobs without processes, whose start takes seconds
    with inside(folder), limited(SECONDS), steps, machine, parallel_config("sequential"):
        result = CliRunner().invoke(main, list(arguments))
    signal.signal(signal.SIGTERM, terminated)
    return result


def check(call: Call, arguments: Sequence[str], folder: Path) -> Result:
    """Run a command, and assert what it promises: an end, one sentence or the whole output, inputs as they were."""
    before = snapshot(folder)
    result = run(arguments, folder)
    outcome = {0: "accepted"}.get(result.exit_code, "refused")
    COUNTS[call.name, outcome] += 1
    require_an_end(result)
    require_inputs(call, before, snapshot(folder))
    leftovers = [file for file in folder.rglob("*.tmp")]
    assert not leftovers, leftovers
    if call.out and call.arguments == tuple(arguments):
        require_whole_output(call, folder / call.out, result.exit_code == 0)
    return result


def require_an_end(result: Result) -> None:
    """With 1 or 2 there is one sentence on stderr; nothing but the end of the program leaves the command."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2), result.exit_code
    assert "Traceback" not in result.output
    if result.exit_code == 0:
        assert not result.stderr, result.stderr
    elif result.exit_code == 1 and result.stdout.startswith("package"):
        assert not result.stderr, result.stderr  # info says in its output what is wrong
    else:
        require_a_sentence(result.stderr, by_click=result.exit_code == 2)


def require_a_sentence(stderr: str, by_click: bool) -> None:
    if by_click:  # which shows how the command is used first, and repeats arguments as they are
        assert "Error: " in stderr, stderr
    else:
        assert stderr.startswith("Error: ") and stderr[-2:] in (".\n", "?\n") and stderr.count("\n") == 1, stderr


def require_inputs(call: Call, before: dict[Path, str], after: dict[Path, str]) -> None:
    for file, content in before.items():
        assert after.get(file) == content or (file.name in call.changes and is_json(file)), file


def is_json(file: Path) -> bool:
    return bool(json.loads(file.read_text()))


def require_whole_output(call: Call, out: Path, accepted: bool) -> None:
    if accepted:
        assert all(list(out.glob(pattern)) for pattern in call.written), sorted(out.rglob("*"))
    elif out.exists():  # compare keeps scores, so that they need not be computed again
        assert call.name == "compare", sorted(out.rglob("*"))
        assert {file.name for file in out.iterdir()} <= {"scores_cache.json", "nnunet_lomix.lock"}, sorted(
            out.iterdir()
        )


def snapshot(folder: Path) -> dict[Path, str]:
    """Content of each file below a folder, as a hash, and where each link leads."""
    found = {}
    for place, folders, names in os.walk(folder):
        for file in (Path(place, name) for name in (*names, *folders)):
            if file.is_symlink():
                found[file] = os.readlink(file)
            elif file.is_file():
                found[file] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found
