"""What can be wrong with a file, for hypothesis to draw: a :data:`Damage` changes one file of a setting."""

import gzip
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import tifffile
import torch
from hypothesis import strategies as st
from skimage.io import imsave

Damage = Callable[[Path], object]

# "\ud800" is half of a pair of UTF-16: JSON can write it, and no file can be named so or hold it in UTF-8
WORDS = (
    "",
    "/",
    "..",
    "../..",
    "*",
    "**",
    "[",
    "a/b",
    "\0",
    "\n",
    "\ud800",
    "mean",
    "ignore",
    "background",
    "[bold]",
    "$x^$",
    "ä" * 300,
    "os.system",
    "2d",
    "4d",
    "nnUNetTrainer",
    "a",
)
NUMBERS = (0, -1, 1, 2, 3, 255, 65535, 65536, 10**9, 10**30, 0.5, 1e308, float("nan"), float("inf"), -float("inf"))
SCALARS = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.text(max_size=5))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner),
    max_leaves=6,
)
# what older versions of nnU-Net, or other programs, write into files of these names
FOREIGN = {
    "summary.json": {"results": {"all": [], "mean": {}}, "task": "Task001"},
    "dataset.json": {"labels": {"0": "background", "1": "liver"}, "modality": {"0": "CT"}, "tensorImageSize": "3D"},
    "plans.json": {"num_stages": 1, "plans_per_stage": {}, "data_identifier": "nnUNetData_plans_v2.1"},
    "splits_final.json": {"0": {"train": ["a"], "val": ["b"]}},
}


def any_damage(file: Path) -> st.SearchStrategy[Damage]:
    """What can be wrong with a file of this name; mostly its content, in its own format."""
    own = {
        ".json": damaged_json,
        ".pth": damaged_checkpoint,
        ".csv": damaged_table,
        ".gz": damaged_image,
        ".png": damaged_image,
        ".tif": damaged_image,
        ".yaml": broken_bytes,
    }[file.suffix]()
    # hypothesis would give each of the alternatives below these the same weight
    return st.integers(0, 9).flatmap(lambda n: own if n < 7 else broken_bytes() if n < 9 else replaced_file())


def broken_bytes() -> st.SearchStrategy[Damage]:
    """Cut off, emptied, changed in some places, or something else altogether."""
    part = st.floats(0, 1)
    return st.one_of(
        part.map(lambda at: rewrite(lambda old: old[: int(at * len(old))])),
        st.tuples(part, st.binary(min_size=1, max_size=8)).map(
            lambda drawn: rewrite(lambda old: overwrite(old, *drawn))
        ),
        st.binary(max_size=60).map(lambda new: rewrite(lambda old: new)),
        st.binary(max_size=600).map(lambda new: rewrite(lambda old: gzip.compress(new))),
        st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n"]).map(lambda mark: rewrite(lambda old: mark + old)),
        st.just(rewrite(lambda old: old.decode("latin-1").encode("utf-16"))),
        st.just(rewrite(lambda old: old + old)),
    )


def rewrite(change: Callable[[bytes], bytes]) -> Damage:
    return lambda file: file.write_bytes(change(file.read_bytes()))


def overwrite(old: bytes, at: float, new: bytes) -> bytes:
    start = int(at * len(old))
    return old[:start] + new + old[start + len(new) :]


def replaced_file() -> st.SearchStrategy[Damage]:
    """Not there, a folder, a link to nothing or to itself, unreadable (for all but root)."""

    def replace(make: Callable[[Path], None]) -> Damage:
        return lambda file: (file.unlink(), make(file))

    def fill(file: Path) -> None:
        file.mkdir()
        (file / "a").touch()

    return st.sampled_from(
        [
            replace(lambda file: None),
            replace(lambda file: file.mkdir()),
            replace(fill),
            replace(lambda file: file.symlink_to("nowhere")),
            replace(lambda file: file.symlink_to(file.name)),
            lambda file: file.chmod(0),
            lambda file: shutil.copy(file, file.with_name(f"._{file.name}")),
            lambda file: file.rename(file.with_name(f"{file.name[0]}_0000{file.name[1:]}")),
        ]
    )


def damaged_json() -> st.SearchStrategy[Damage]:
    """A key that is missing, a value of another type, a list that is shorter, deep nesting, another program's file."""
    edit = st.tuples(st.integers(0, 10**6), st.sampled_from(["drop", "set", "rename", "repeat"]), VALUES)
    whole = st.one_of(
        VALUES.map(lambda value: lambda file: file.write_text(json.dumps(value))),
        st.just(lambda file: file.write_text(json.dumps(FOREIGN.get(file.name, {})))),
        st.sampled_from(['{"a":', "["]).map(lambda start: rewrite(lambda old: start.encode() * 100_000)),
    )
    edited = st.lists(edit, min_size=1, max_size=3).map(edited_json)
    return st.integers(0, 9).flatmap(lambda n: edited if n < 8 else whole)


def edited_json(edits: list[tuple[int, str, Any]]) -> Damage:
    def damage(file: Path) -> None:
        content = json.loads(file.read_text())
        for which, how, value in edits:
            edit_value(content, which, how, value)
        file.write_text(json.dumps(content))

    return damage


def edit_value(content: Any, which: int, how: str, value: Any) -> None:
    """Change one of the values anywhere in nested lists and dictionaries."""
    places = list(list_places(content))
    if not places:
        return
    parent, key = places[which % len(places)]
    if how == "drop":
        del parent[key]
    elif how == "set":
        parent[key] = value
    elif isinstance(parent, dict):
        parent[str(value)] = parent.pop(key) if how == "rename" else parent[key]
    else:
        parent.insert(key, parent[key])


def list_places(content: Any) -> Any:
    if isinstance(content, (dict, list)):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from list_places(content[key])


class Stranger:
    """What a checkpoint must not have in it."""


def damaged_checkpoint() -> st.SearchStrategy[Damage]:
    """Other values, types and shapes, other pickles."""
    values = st.one_of(
        VALUES,
        st.sampled_from([torch.zeros(1), torch.zeros(2, 3, dtype=torch.complex64), np.float64("nan"), [np.float32(1)]]),
        st.lists(st.sampled_from([1.0, -1.0, float("nan"), 0.0]), max_size=3),
        st.lists(st.dictionaries(st.sampled_from(["z_0", "z_1", "add_0_1", "x", ""]), st.floats()), max_size=3),
    )
    edit = st.tuples(st.integers(0, 10**6), st.sampled_from(["drop", "set", "rename", "repeat"]), values)

    def edited(edits: list[tuple[int, str, Any]]) -> Damage:
        def damage(file: Path) -> None:
            content = torch.load(file, weights_only=False)
            for which, how, value in edits:
                edit_value(content, which, how, value)
            torch.save(content, file)

        return damage

    others = [pickle.dumps({"a": 1}), pickle.dumps(Stranger()), b"PK\3\4" + bytes(40)]
    return st.one_of(
        st.lists(edit, min_size=1, max_size=3).map(edited),
        st.sampled_from(others).map(lambda new: rewrite(lambda old: new)),
        values.map(lambda value: lambda file: torch.save(value, file)),
    )


def damaged_table() -> st.SearchStrategy[Damage]:
    """A CSV file with another cell, column or line."""
    cells = st.sampled_from(["", "nan", "inf", "-1", "1e400", "x", '"', ",", "z_0", "0x1", "z_00", "é"])

    def edited(line: int, column: int, cell: str) -> Damage:
        def change(old: bytes) -> bytes:
            rows = [row.split(",") for row in old.decode().splitlines()]
            row = rows[line % len(rows)]
            row[column % len(row)] = cell
            return "\n".join(map(",".join, rows)).encode()

        return rewrite(change)

    lines = st.integers(0, 3).map(lambda n: rewrite(lambda old: b"".join(old.splitlines(keepends=True)[:n])))
    return st.builds(edited, st.integers(0, 9), st.integers(0, 9), cells) | lines


def damaged_image() -> st.SearchStrategy[Damage]:
    """Other numbers, types, shapes and places of voxels, a broken header, another kind of file."""
    kinds = [np.uint8, np.int16, np.int32, np.uint32, np.float32, np.float64, np.int64]
    numbers = [0, 1, 2, 3, 7, -1, 0.5, 255, 65536, 2**31 - 1, float("nan"), float("inf"), 1e30]
    shapes = [(1, 8, 8), (8, 8), (1, 8, 9), (1, 1, 1), (8, 8, 8), (2, 1, 8, 8), (1, 1, 8, 8), (1, 2, 2, 2, 2)]

    def refilled(kind: Any, shape: tuple[int, ...], filling: list[float], place: tuple[float, ...]) -> Damage:
        def damage(file: Path) -> None:
            with np.errstate(all="ignore"):
                voxels = np.resize(np.array(filling), shape).astype(kind)
            spacing, origin, vector = place
            if file.suffix == ".png":
                return write_png(voxels, file)
            if file.suffix == ".tif":
                return tifffile.imwrite(file, voxels)
            image = sitk.GetImageFromArray(voxels, isVector=bool(vector and voxels.ndim > 2))
            image.SetSpacing([spacing] * image.GetDimension())
            image.SetOrigin([origin] * image.GetDimension())
            file.unlink()
            sitk.WriteImage(image, file)

        return damage

    spacings, origins = st.sampled_from([1.0, 1.0, 0.1, 1e-30, 1e30]), st.sampled_from([0.0, 0.0, 5.0, 1e30])
    return st.one_of(
        st.builds(
            refilled,
            st.sampled_from(kinds),
            st.sampled_from(shapes[:1] * 4 + shapes),
            st.lists(st.sampled_from(numbers), min_size=1, max_size=4),
            st.tuples(spacings, origins, st.booleans()),
        ),
        st.builds(edited_header, st.sampled_from(sorted(HEADER)), st.sampled_from(HEADER_NUMBERS)),
        st.sampled_from([3, 4]).map(lambda channels: lambda file: write_as_png(channels, file)),
    )


# fields of a NIfTI-1 header: where they are, and how they are written
HEADER = {
    "sizeof_hdr": (0, "<i"),
    "ndim": (40, "<h"),
    "x": (42, "<h"),
    "y": (44, "<h"),
    "z": (46, "<h"),
    "t": (48, "<h"),
    "intent": (68, "<h"),
    "datatype": (70, "<h"),
    "bitpix": (72, "<h"),
    "qfac": (76, "<f"),
    "dx": (80, "<f"),
    "dz": (88, "<f"),
    "vox_offset": (108, "<f"),
    "slope": (112, "<f"),
    "inter": (116, "<f"),
    "units": (123, "<b"),
    "qform": (252, "<h"),
    "sform": (254, "<h"),
    "quatern_b": (256, "<f"),
    "offset_x": (268, "<f"),
    "srow_x": (280, "<f"),
    "srow_z": (320, "<f"),
    "magic": (344, "<i"),
}
HEADER_NUMBERS = (0, 1, 2, 4, 5, 16, 32, 64, 128, 512, 1792, 2304, -1, 32767, float("nan"), float("inf"), 0.5, 1e30)


def edited_header(field: str, number: float) -> Damage:
    """A number in a field of a NIfTI file's header; nothing for other files."""
    place, form = HEADER[field]
    if form != "<f":
        bits = struct.calcsize(form) * 8 - 1
        number = int(np.clip(np.nan_to_num(number), -(2**bits), 2**bits - 1))

    def damage(file: Path) -> None:
        if file.suffix != ".gz":
            return
        content = bytearray(gzip.decompress(file.read_bytes()))
        with np.errstate(all="ignore"):
            struct.pack_into(form, content, place, number)
        file.write_bytes(gzip.compress(content))

    return damage


def write_png(voxels: np.ndarray, file: Path) -> None:
    """As much of an array as a PNG can hold: grey, or in colours, with or without transparency."""
    picture = np.atleast_2d(np.squeeze(voxels))
    if picture.ndim > 2 and picture.shape[-1] not in (3, 4):
        picture = picture.reshape(len(picture), -1)
    deep = picture.ndim == 2 and voxels.dtype.itemsize > 1
    with np.errstate(all="ignore"):
        imsave(file, picture.astype(np.uint16 if deep else np.uint8), check_contrast=False)


def write_as_png(channels: int, file: Path) -> None:
    """A coloured picture in place of the file, whatever its name says."""
    picture = file.with_name("picture.png")
    imsave(picture, np.arange(8 * 8 * channels, dtype=np.uint8).reshape(8, 8, channels), check_contrast=False)
    picture.replace(file)
