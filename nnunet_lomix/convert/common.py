"""What the converters share: finding and checking a download, volumes, folders that appear once they are whole."""

import gzip
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from nnunet_lomix.compare.sources import shorten
from nnunet_lomix.errors import LoMixError, explaining
from nnunet_lomix.locks import NAME as LOCK
from nnunet_lomix.locks import Lock
from nnunet_lomix.nnunet.datasets import is_hidden, require_utf8

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".rar", ".7z")
CHUNK = 2**20  # bytes


class Case(NamedTuple):
    """The files of a case in a download."""

    image: Path
    labels: Path


@dataclass(frozen=True)
class Download:
    """A download that is whole, as far as the names and sizes of its files tell.

    Attributes:
        name: of the dataset, behind nnU-Net's ``DatasetNNN_``.
        number: of the dataset, if the user gives none.
        channels: their names, by which nnU-Net chooses how it normalises intensities.
        classes: their names, from label 1 on.
        ending: of nnU-Net's files.
        cases: the files, by nnU-Net's name of the case.
        train, test, val: the paper's; the last may be empty.
        write_image, write_labels: make nnU-Net's file (second) of one of the download (first); they raise
            :class:`LoMixError` for a file that isn't as it should be.
        notes: sentences that a user should know.
    """

    name: str
    number: int
    channels: Sequence[str]
    classes: Sequence[str]
    ending: str
    cases: Mapping[str, Case]
    train: list[str]
    test: list[str]
    val: list[str]
    write_image: Callable[[Path, Path], None]
    write_labels: Callable[[Path, Path], None]
    notes: list[str] = field(default_factory=list)


def require_unpacked(source: Path) -> None:
    """Refuse an archive, or any other file.

    Raises:
        LoMixError: the source is no folder.
    """
    require_utf8(source)
    if not source.is_dir():
        raise LoMixError(f"{source} is not a folder: unpack the download, and give the folder that comes out.")


def find_folder(source: Path, places: Sequence[str], fits: Callable[[Path], bool], what: str) -> Path:
    """The first of some places below a source that fits.

    Args:
        source: folder.
        places: paths relative to it; "" is the source itself.
        fits: whether a folder is the one.
        what: what it must have, for the message.

    Raises:
        LoMixError: none fits.
    """
    for place in places:
        if (source / place).is_dir() and fits(source / place):
            return source / place
    raise LoMixError(f"{source} has no {what}: {advise(source)}")


def advise(source: Path) -> str:
    """What to do about a folder that isn't the download."""
    packed = [file.name for file in sorted(source.iterdir()) if file.name.lower().endswith(ARCHIVES)]
    if packed:
        return f"unpack {shorten(packed)} first."
    return "give the folder that comes out when the download is unpacked."


def require_files(folder: Path, files: Iterable[Path]) -> None:
    """Refuse a download that lacks files.

    Raises:
        LoMixError: some are missing or empty; it names the first ones, relative to the folder.
    """
    missing = [str(file.relative_to(folder)) for file in files if not file.is_file() or not file.stat().st_size]
    if missing:
        raise LoMixError(f"{folder} lacks {shorten(missing)}: the download is not whole, so repeat it.")


def list_files(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """The files of a folder with some endings, by name without it, sorted; hidden ones are none."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in endings and not is_hidden(file))
    return {file.stem: file for file in files}


def check_sizes(cases: Iterable[Case]) -> list[tuple[sitk.ImageFileReader, sitk.ImageFileReader]]:
    """Read the headers of all images and labels.

    Raises:
        LoMixError: one can't be read, or labels are of another size than their image.
    """
    headers = []
    for case in cases:
        image, labels = map(read_header, case)
        if image.GetSize() != labels.GetSize():
            sizes = (" × ".join(map(str, header.GetSize())) for header in (labels, image))
            raise LoMixError(f"{case.labels} has {' voxels, but its image '.join(sizes)}: repeat the download.")
        headers.append((image, labels))
    return headers


def check_grids(cases: Sequence[Case]) -> list[str]:
    """Refuse volumes and labels that differ in size or spacing.

    Returns:
        A sentence on labels that lie elsewhere by their header, if there are any. nnU-Net takes voxels as they are in
        the arrays, so it trains on these, with a warning.

    Raises:
        LoMixError: as :func:`check_sizes`, or a spacing differs.
    """
    moved = []
    for case, (image, labels) in zip(cases, check_sizes(cases), strict=True):
        if not np.allclose(image.GetSpacing(), labels.GetSpacing(), rtol=1e-3):
            sizes = (" × ".join(f"{mm:g}" for mm in header.GetSpacing()) for header in (labels, image))
            raise LoMixError(
                f"{case.labels} has voxels of {' mm, but its image of '.join(sizes)}: repeat the download."
            )
        placement, own = ([*header.GetOrigin(), *header.GetDirection()] for header in (image, labels))
        if not np.allclose(placement, own, rtol=1e-3, atol=1e-2):
            moved.append(case.labels.name)
    if not moved:
        return []
    return [f"By their headers these labels lie elsewhere than their images, which nnU-Net ignores: {shorten(moved)}."]


def read_header(file: Path) -> sitk.ImageFileReader:
    """What the file says of its image: size, spacing, origin, direction.

    Raises:
        LoMixError: it can't be read.
    """
    require_utf8(file)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    with explaining(f"{file} can't be read, so repeat the download"):
        reader.ReadImageInformation()
    return reader


def read(file: Path) -> sitk.Image:
    """An image.

    Raises:
        LoMixError: it can't be read.
    """
    with explaining(f"{file} can't be read, so repeat the download"):
        return sitk.ReadImage(str(file))


def copy_volume(source: Path, target: Path) -> None:
    """Copy a ``.nii.gz``, byte by byte.

    Raises:
        LoMixError: it is damaged or cut off, by its checksum.
    """
    with explaining(f"{source} is damaged, so repeat the download"), gzip.open(source) as stream:
        while stream.read(CHUNK):
            pass
    shutil.copyfile(source, target)


def read_labels(file: Path, highest: int) -> tuple[sitk.Image, np.ndarray]:
    """Labels of a volume, and their values (int64; z, y, x).

    Raises:
        LoMixError: the file can't be read, or a value isn't a whole number from 0 to ``highest``.
    """
    image = read(file)
    found = sitk.GetArrayFromImage(image)
    values = found.astype(np.int64)
    if not np.array_equal(values, found) or values.min() < 0 or values.max() > highest:
        raise LoMixError(
            f"{file} has values other than 0 to {highest} ({found.min():g} to {found.max():g}): it isn't the labels "
            "of this dataset."
        )
    return image, values


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``folder``, which becomes ``folder`` if the block ends without an exception.

    Its name begins with a dot, so that nnU-Net doesn't take it for a dataset. What a killed process left there is
    removed by the next one, so that nothing piles up.

    Raises:
        LoMixError: another process makes the same folder.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    with Lock(temporary, "conversion"):
        try:
            for left in temporary.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != LOCK:
                    left.unlink()
            yield temporary
            (temporary / LOCK).unlink()
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
