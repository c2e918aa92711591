"""Every command, with arguments of all kinds."""

import os
import shutil

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_lomix.cli import main

from .commands import CALLS, FUZZ, Call, check, copied
from .damage import WORDS
from .world import DATASET, MODELS, TRAINERS

PLACES = (
    ".",
    "nowhere",
    "nowhere/deeper",
    "file.txt",
    "file.txt/inside",
    "empty",
    "loop",
    "dangling",
    os.fsdecode(b"not\xffutf8"),  # what the names of files may be on Linux
    os.fsdecode(b"not\xffutf8/after"),
    "results",
    MODELS[0],
    f"{MODELS[1]}/fold_0",
    f"{MODELS[0]}/plans.json",
    f"preprocessed/{DATASET}",
    f"raw/{DATASET}/imagesTr",
    f"raw/{DATASET}/imagesTr/b_0000.nii.gz",
    "nifti/references",
    "png/before",
    "/dev/null",
    "/dev/null/a",
    "/proc/nowhere",
    "a" * 300,
    "a/" * 3000,
)
NAMES = (DATASET, "9", "009", "Dataset", "Dataset009_", "Dataset010_Other", "Dataset010_a/b", "nnUNetPlans", *TRAINERS)
NUMBERS = ("0", "1", "-1", "2", "3", "7", "1e3", "0.5", "nan", "inf", "-inf", "1e400", "9" * 30, "9" * 5000, "٣", "1_0")
# "/" would name other places of this machine; no program gets the other two in its arguments
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=8)).filter(lambda text: not set("/\0\ud800") & set(text))
VALUES = st.one_of(st.sampled_from(PLACES), st.sampled_from(NAMES), st.sampled_from(NUMBERS), TEXTS)


def list_options(call: Call) -> list[str]:
    command = main.commands[call.name]
    return [name for option in command.params if isinstance(option, click.Option) for name in option.opts]


@st.composite
def changed_arguments(draw: st.DrawFn, call: Call) -> list[str]:
    """The arguments of a call, with a value replaced, another option, or one of them left out, moved or too many."""
    arguments = list(call.arguments)
    options = list_options(call)
    for _ in range(draw(st.integers(1, 2))):
        values = [place for place, argument in enumerate(arguments) if place and not argument.startswith("-")]
        # mostly what is not refused at first sight
        how = draw(st.integers(0, 9))
        if how < 5 and values:
            arguments[draw(st.sampled_from(values))] = draw(VALUES)
        elif how < 8 and options:
            arguments += [draw(st.sampled_from(options)), draw(VALUES)]
        elif how == 8 and len(arguments) > 1:
            argument = arguments.pop(draw(st.integers(1, len(arguments) - 1)))
            if draw(st.booleans()):
                arguments.append(argument)
        else:
            arguments.append(draw(VALUES))
    return arguments


@pytest.mark.parametrize("name", CALLS)
@FUZZ
@given(data=st.data())
def test_changed_arguments(world, name, data):
    with copied(world) as folder:
        (folder / "empty").mkdir()
        (folder / "file.txt").write_text("text")
        (folder / "loop").symlink_to("loop")
        (folder / "dangling").symlink_to("missing")
        (folder / os.fsdecode(b"not\xffutf8")).mkdir()
        shutil.copytree(folder / "nifti" / "after", folder / os.fsdecode(b"not\xffutf8") / "after")
        check(CALLS[name], data.draw(changed_arguments(CALLS[name])), folder)
