"""Time and memory of `nnunet_lomix compare` by number of cases.

    python benchmarks/compare.py --cases 20 200

Two folders of predictions and one of references, of 128³ voxels with 8 organs. The voxels of all cases are those of a
few files, but no case has the bytes of another one, so that the cache finds none; then a second call finds all of them.
"""

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from joblib.externals.loky import get_reusable_executor
from scipy.ndimage import gaussian_filter

SHAPE, DISTINCT = (128, 128, 128), 4
COLUMNS = ("s", "CPU s", "MiB parent", "MiB largest worker")
NOISE = {"references": 0, "old": 0.5, "new": 0.3}  # how far each folder is from the references


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # a process of its own for each peak
    args = parser.parse_args()
    if args.measure:
        print(*measure(args.measure, args.jobs))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {name: [make_segmentation(i, noise) for i in range(DISTINCT)] for name, noise in NOISE.items()}
        for cases in args.cases:
            root = Path(folder, str(cases))
            write_cases(root, files, cases)
            command = [sys.executable, __file__, "--jobs", str(args.jobs), "--measure", root]
            first, again = (list(map(float, subprocess.check_output(command).split()[-4:])) for _ in range(2))
            rows.append({"cases": cases, **dict(zip(COLUMNS, first, strict=True)), "s again": again[0]})
    print(f"Two trainers, {args.jobs} processes, with the start of Python; peaks of memory.\n")
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".0f"))


def make_segmentation(number: int, noise: float) -> bytes:
    """A file of organs, a bumpy ball about 40 voxels wide in each octant."""
    rng = np.random.default_rng(number)
    bumps, changes = (rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(2))
    bumps = gaussian_filter(bumps + noise * changes, 6)
    octant, position = np.divmod(np.indices(SHAPE), 64)
    inside = np.linalg.norm(position - 31.5, axis=0) + 4 * bumps / bumps.std() < 20
    labels = np.where(inside, 1 + np.tensordot((1, 2, 4), octant, 1), 0).astype(np.uint8)
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing((0.8, 0.8, 2.5))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "labels.nii.gz")
        sitk.WriteImage(image, file)
        return file.read_bytes()


def write_cases(root: Path, files: dict[str, list[bytes]], cases: int):
    for name, contents in files.items():
        (root / name).mkdir(parents=True)
        for case in range(cases):
            # an empty part with a date of its own: other bytes, the same voxels
            unique = contents[case % DISTINCT] + gzip.compress(b"", mtime=case)
            (root / name / f"case_{case}.nii.gz").write_bytes(unique)
    labels = {"background": 0} | {f"organ {i}": i for i in range(1, 9)}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))


def measure(root: Path, jobs: int) -> list[float]:
    """What ``COLUMNS`` says."""
    start = time.perf_counter()
    from nnunet_lomix.compare import compare, read_folders  # users wait for it, too

    source = read_folders(root / "references", [root / "old", root / "new"], jobs=jobs)
    compare(source, jobs=jobs, cache_file=root / "cache.json")
    seconds = time.perf_counter() - start
    get_reusable_executor().shutdown()  # the system counts children that have ended
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return [seconds, sum(u.ru_utime + u.ru_stime for u in usage), *(u.ru_maxrss / 1024 for u in usage)]


if __name__ == "__main__":
    main()
