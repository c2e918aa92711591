"""The files of a comparison, and what is printed.

For people, Dice, NSD and IoU are in points (0 to 100); in ``scores.csv`` and ``comparison.json`` they are from 0 to 1.
HD95 is in mm everywhere, or in pixels where the files have no scale.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from nnunet_lomix.compare.content import describe
from nnunet_lomix.compare.markdown import to_markdown
from nnunet_lomix.compare.metrics import METRICS
from nnunet_lomix.compare.page import to_html
from nnunet_lomix.compare.sources import CaseFiles
from nnunet_lomix.compare.terminal import print_report
from nnunet_lomix.files import replacing


def write_report(
    folder: str | Path,
    scores: pd.DataFrame,
    comparison: pd.DataFrame,
    information: Mapping[str, Any],
    curves: pd.DataFrame,
    files: Mapping[str, CaseFiles],
    console: Console,
) -> None:
    """Write ``scores.csv``, ``comparison.json``, ``report.md`` and ``report.html``; print the tables.

    The numbers are written first, so that a picture that fails can't lose them, and printed last, as whoever reads them
    may leave; every file is whole or not there.

    Args:
        folder: where to write; made if it isn't there.
        scores: a row for each case, class, trainer, seed and metric; Dice, NSD and IoU from 0 to 1, HD95 in the
            unit of distances; never NaN.
        comparison: a row for each metric, class (the last is ``mean``) and candidate, as of
            :func:`~nnunet_lomix.compare.statistics.compare_trainers`.
        information: any of ``dataset``, ``configuration``, ``folds``, ``classes`` (the values of each), ``metrics``
            (their implementation), ``distance_unit`` (``mm``, or ``pixels``), ``tolerance_mm`` or
            ``tolerance_pixels`` (of the NSD), ``notes`` (sentences), ``epoch_seconds`` (by
            trainer), ``versions`` (by package), ``label_source`` and ``date``; all of it goes into ``comparison.json``.
        curves: ``trainer``, ``seed``, ``fold``, ``epoch``, ``pseudo_dice``; may be empty.
        files: of each case; may be empty.
        console: where to print.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "scores.csv", scores.to_csv(index=False))
    _write(folder / "comparison.json", to_json(comparison, information))
    report = describe(scores, comparison, information)
    _write(folder / "report.md", to_markdown(report))
    try:
        page = to_html(report, scores, comparison, information.get("classes") or {}, curves, files)
        _write(folder / "report.html", page)
    finally:
        print_report(report, console)
    console.print(f"The report with pictures: {folder / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(comparison: pd.DataFrame, information: Mapping[str, Any]) -> str:
    """Information and statistics; what is not a number is null."""
    rows = json.loads(comparison.to_json(orient="records", double_precision=15))
    distance = information.get("distance_unit", "mm")
    units = {name: "0 to 1" if METRICS[name].is_share else distance for name in comparison["metric"].unique()}
    content = {"information": dict(information), "units": units, "comparison": rows}
    return json.dumps(content, indent=2, ensure_ascii=False, default=str)
