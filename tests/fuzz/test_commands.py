"""Every command, with damaged files and with arguments of all kinds: an end, one sentence or the whole output.

``FUZZ_EXAMPLES=100`` draws a hundred inputs in each test, other ones each time.
"""

import contextlib
import gzip
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import click
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from joblib import parallel_config
from skimage.io import imsave

from nnunet_lomix.cli import main

from .world import DATASET, MODELS, TRAINERS, UNTABLED, inside

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
FUZZ = settings(
    max_examples=EXAMPLES or 6,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a smaller example would cost as many calls again
)
SECONDS = 180  # the slowest of these commands takes two, on a machine that has nothing else to do
SPLITS = f"preprocessed/{DATASET}/splits_final.json"
MODEL_FILES = ("plans.json", "dataset.json", "fold_*/checkpoint_final.pth", "fold_*/validation/summary.json")
MODEL = tuple(f"{MODELS[1]}/{file}" for file in MODEL_FILES)
IMAGE = f"raw/{DATASET}/imagesTr/a_0000.nii.gz"
SCORED = ("report.html", "report.md", "scores.csv")
# arguments, patterns of the files that are read, patterns of what is in the folder "out" after a success
CALLS = {
    "info": ("info", (), ()),
    "splits": ("splits -d 9 --train-cases 2", (SPLITS,), ()),
    "convert": ("convert synapse download", ("download/RawData/Training/*/*.nii.gz",), ()),
    "weights": (f"weights {' '.join(MODELS[1:])}", (f"{MODELS[1]}/fold_*/lomix_weights.csv", SPLITS), ("weights.*",)),
    "weights of checkpoints": (f"weights {UNTABLED}", (f"{UNTABLED}/fold_*/checkpoint_final.pth",), ("weights.*",)),
    "export": (f"export {MODELS[1]}", MODEL, ("*/*/plans.json", "*/*/fold_*/checkpoint_final.pth")),
    "export with a case": (f"export {MODELS[1]} --case {IMAGE}", (IMAGE, *MODEL), ("*/*/provenance.txt",)),
    "status": ("status plan.yaml", ("plan.yaml", MODEL[-1]), ()),
    "run": ("run plan.yaml --dry-run", ("plan.yaml", SPLITS, f"preprocessed/{DATASET}/nnUNetPlans.json"), ()),
    "compare results": (
        f"compare -d 9 -c 2d -tr {' '.join(TRAINERS)} --jobs 1",
        (*MODEL, f"{MODELS[1]}/fold_*/validation/*.nii.gz", SPLITS, f"preprocessed/{DATASET}/gt_segmentations/*"),
        SCORED,
    ),
    **{
        f"compare {kind}": (
            f"compare --references {kind}/references --predictions {kind}/before {kind}/after --jobs 1",
            (f"{kind}/*/*",),
            SCORED,
        )
        for kind in ("nii", "png")
    },
}


def list_arguments(name: str) -> list[str]:
    arguments, _, written = CALLS[name]
    return [*arguments.split(), *(["--out", "out"] if written else [])]


@contextlib.contextmanager
def copied(world):
    """A copy of the setting, to spoil."""
    memory = Path("/dev/shm")  # a disk that others use takes longer for the copy than the command for its work
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        yield shutil.copytree(world, Path(temporary, "world"), symlinks=True)


def snapshot(folder):
    """What each file holds, and where each link leads."""
    files = [Path(place, name) for place, folders, names in os.walk(folder) for name in (*folders, *names)]
    return {f: os.readlink(f) if f.is_symlink() else f.read_bytes() for f in files if f.is_symlink() or f.is_file()}


def give_up(*_):
    pytest.fail(f"not ended after {SECONDS} s")


def check(arguments, folder):
    """Run a command, and assert what it promises."""
    before, terminated = snapshot(folder), signal.getsignal(signal.SIGTERM)  # some commands have a handler of their own
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    with inside(folder), parallel_config("sequential"):  # processes take seconds to start
        result = CliRunner().invoke(main, arguments)
    signal.alarm(0)
    signal.signal(signal.SIGTERM, terminated)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2)
    if result.exit_code == 2:  # click shows how the command is used, too
        assert "Error: " in result.stderr
    elif result.exit_code == 0 or arguments[0] == "info":
        assert not result.stderr
    else:
        assert result.stderr.startswith("Error: ") and result.stderr[-2:] in (".\n", "?\n"), result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
    after = snapshot(folder)
    changed = {file for file, content in before.items() if after.get(file) != content}
    assert changed <= {folder / SPLITS} and json.loads(after[folder / SPLITS]) if changed else True, changed
    assert not [file for file in after if file.suffix == ".tmp" or "/.Dataset" in str(file)]
    return result


def require_output(name, folder, accepted):
    """All files after a success; nothing else, but for compare's scores, which need not be computed again."""
    if accepted:
        assert all(list((folder / "out").glob(pattern)) for pattern in CALLS[name][2]), sorted(folder.glob("out/*"))
    else:
        assert {file.name for file in folder.glob("out/*")} <= {"scores_cache.json", "nnunet_lomix.lock"}


# "\ud800" is half of a pair of UTF-16: JSON can write it, and no file can be named so or hold it in UTF-8
WORDS = ("", "..", "*", "[", "a/b", "\n", "\ud800", "mean", "background", "[bold]", "$x^$", "ä" * 300, "os.system", "a")
NUMBERS = (0, -1, 1, 2, 255, 65536, 10**30, 0.5, 1e308, float("nan"), float("inf"))
SCALARS = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(WORDS)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.sampled_from(WORDS), SCALARS, max_size=2)
IMAGES = [
    (np.uint8, (1, 8, 9)),
    (np.uint8, (8, 8)),
    (np.float32, (1, 8, 8)),
    (np.int16, (2, 1, 8, 8)),
    (np.uint8, (8, 8, 3)),
]


def edit_value(content, which, value):
    """Replace one of the values anywhere in nested lists and dictionaries, or drop it where ``value`` is a tuple."""
    places, todo = [], [content]
    for parent in todo:
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        places += [(parent, key) for key in keys]
        todo += [parent[key] for key in keys if isinstance(parent[key], (dict, list))]
    parent, key = places[which % len(places)]
    if value == ():
        del parent[key]
    else:
        parent[key] = value


def damage(draw, file):
    """Change a file: mostly its content in its own format, or else its bytes, or what it is."""
    old, how = file.read_bytes(), draw(st.integers(0, 9))
    if how == 9:
        file.unlink()
        draw(st.sampled_from([lambda: None, file.mkdir, lambda: file.symlink_to("nowhere")]))()
    elif how > 6 or file.suffix == ".yaml":
        at = draw(st.integers(0, len(old)))
        new = draw(st.binary(max_size=8))
        file.write_bytes(draw(st.sampled_from([old[:at], old[:at] + new + old[at + len(new) :], new, new + old])))
    elif file.suffix in (".json", ".pth"):
        content = json.loads(old) if file.suffix == ".json" else torch.load(file, weights_only=False)
        for _ in range(draw(st.integers(1, 3))):
            if content:
                edit_value(content, draw(st.integers(0, 10**6)), draw(VALUES | st.just(())))
        file.write_text(json.dumps(content)) if file.suffix == ".json" else torch.save(content, file)
    elif file.suffix == ".csv":
        cells = [row.split(",") for row in old.decode().splitlines()]
        row = draw(st.sampled_from(cells))
        row[draw(st.integers(0, len(row) - 1))] = draw(st.sampled_from(["", "nan", "inf", "-1", "x", '"', "z_0"]))
        file.write_text("\n".join(map(",".join, cells)))
    elif draw(st.booleans()) and file.suffix == ".gz":  # a field of the header
        content = bytearray(gzip.decompress(old))
        at = draw(st.integers(0, 347))
        content[at : at + 4] = draw(st.binary(min_size=4, max_size=4))
        file.write_bytes(gzip.compress(content))
    else:
        kind, shape = draw(st.sampled_from(IMAGES))
        voxels = np.resize(np.array(draw(st.sampled_from([[0, 1], [0, 7], [200, 1]]))), shape).astype(kind)
        if file.suffix == ".png":
            imsave(file, np.squeeze(voxels).reshape(-1, 8).astype(np.uint8), check_contrast=False)
        else:
            sitk.WriteImage(sitk.GetImageFromArray(voxels, isVector=draw(st.booleans())), file)


@pytest.mark.parametrize("name", CALLS)
def test_the_small_setting_is_accepted(world, name):
    with copied(world) as folder:
        assert check(list_arguments(name), folder).exit_code == 0
        require_output(name, folder, accepted=True)


@pytest.mark.parametrize("name", [name for name, (_, inputs, _) in CALLS.items() if inputs])
@FUZZ
@given(data=st.data())
def test_damaged_inputs(world, name, data):
    with copied(world) as folder:
        inputs = [file for pattern in CALLS[name][1] for file in sorted(folder.glob(pattern))]
        damage(data.draw, data.draw(st.sampled_from(inputs)))
        result = check(list_arguments(name), folder)
        require_output(name, folder, result.exit_code == 0)


PLACES = (".", "nowhere/deeper", "file.txt", "file.txt/a", "loop", os.fsdecode(b"not\xffutf8"), "results", MODELS[0])
PLACES += (f"{MODELS[1]}/fold_0", f"raw/{DATASET}/imagesTr", "nii/references", "/dev/null", "a" * 300, "a/" * 3000)
ARGUMENTS = (
    *PLACES,
    DATASET,
    "9",
    "009",
    "Dataset010_a/b",
    *TRAINERS,
    "0",
    "-1",
    "2",
    "1e3",
    "nan",
    "inf",
    "9" * 5000,
    "٣",
)
# no program gets these in its arguments
TEXTS = st.sampled_from([word for word in WORDS if word != "\ud800"]) | st.text("ab -=[:*é", max_size=8)


@pytest.mark.parametrize("name", CALLS)
@FUZZ
@given(data=st.data())
def test_changed_arguments(world, name, data):
    """A value replaced, another option, or one of them left out or too many."""
    arguments, draw = list_arguments(name), data.draw
    options = [o for p in main.commands[arguments[0]].params if isinstance(p, click.Option) for o in p.opts]
    for _ in range(draw(st.integers(1, 2))):
        value = draw(st.sampled_from(ARGUMENTS) | TEXTS)
        places = [place for place, argument in enumerate(arguments) if place and not argument.startswith("-")]
        how = draw(st.integers(0, 9))
        if how < 5 and places:
            arguments[draw(st.sampled_from(places))] = value
        elif how < 8 and options:
            arguments += [draw(st.sampled_from(options)), value]
        elif how == 8 and len(arguments) > 1:
            del arguments[draw(st.integers(1, len(arguments) - 1))]
        else:
            arguments.append(value)
    with copied(world) as folder:
        (folder / "file.txt").write_text("text")
        (folder / "loop").symlink_to("loop")
        shutil.copytree(folder / "nii", folder / os.fsdecode(b"not\xffutf8"))
        check([*arguments, *(["--dry-run"] if arguments[0] == "run" else [])], folder)
