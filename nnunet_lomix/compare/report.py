"""The files of a comparison, and what is printed: numbers for programs, a text, and a page that needs nothing else.

In ``scores.csv`` and ``comparison.json`` shares are from 0 to 1. ``report.md`` and ``report.html`` beside this module
say what the text and the page look like.
"""

import json
import re
from base64 import b64encode
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from textwrap import wrap
from typing import Any

import jinja2
from markupsafe import Markup, escape
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nnunet_lomix.compare import plots
from nnunet_lomix.compare.findings import Comparison, Findings, MetricTable, describe
from nnunet_lomix.compare.metrics import METRICS
from nnunet_lomix.compare.overlays import CLASS_COLOURS, Overlays, draw_overlays
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.errors import describe as describe_error
from nnunet_lomix.files import replacing

SHOWN_CASES = 4
LEGEND = (
    "p: Wilcoxon's test, after Holm's correction. b:s:w: cases better:same:worse. "
    "*: better or worse by interval, test and seeds; all others are undecided."
)
ABOUT_NETWORKS = " Where a trainer has one training, * is about these networks; another training may show otherwise."
NUMBERS = ("mean", "difference", "95 % interval", "p", "b:s:w")  # columns on the terminal, behind the two of names
WIDTH_OF_NUMBERS = 50  # of all of them, with the blanks between


def write_report(folder: Path, result: Comparison, console: Console) -> None:
    """Write ``scores.csv``, ``comparison.json``, ``report.md`` and ``report.html``; print the tables.

    The numbers are written first, so that a picture that fails can't lose them, and printed last, as whoever reads them
    may leave; every file is whole or not there.
    """
    _write(folder / "scores.csv", result.scores.to_csv(index=False))
    _write(folder / "comparison.json", to_json(result))
    findings = describe(result)
    _write(folder / "report.md", to_markdown(findings))
    try:
        _write(folder / "report.html", to_html(findings))
    finally:
        print_findings(findings, console)
    console.print(f"The report with pictures: {folder / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(result: Comparison) -> str:
    """Information and statistics; what is not a number is null."""
    rows = json.loads(result.comparison.to_json(orient="records", double_precision=15))
    distance = result.source.distance_unit
    units = {name: distance if METRICS[name].is_distance else "0 to 1" for name in result.settings.metrics}
    content = {"information": result.information, "units": units, "comparison": rows}
    return json.dumps(content, indent=2, ensure_ascii=False)


# text


def to_markdown(findings: Findings) -> str:
    """The findings as a text, in which every value is shown as it is."""
    # every value of the template passes through finalize, as with autoescape in HTML
    return _read_template("report.md", finalize=_escape, keep_trailing_newline=True).render(report=findings)


def _escape(value: object) -> str:
    """Text that Markdown shows as it is, in a cell of a table, too.

    >>> print(_escape("tumour | <b>"))
    tumour \\| \\<b\\>
    """
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", str(value)).replace("\n", " ")


def _read_template(name: str, **options: Any) -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)
    environment.filters["folding"] = _fold
    environment.filters["base64"] = lambda content: b64encode(content).decode()
    return environment.from_string(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def print_findings(findings: Findings, console: Console) -> None:
    """Print the headlines and a table for each metric, as wide as the console; names are folded."""
    for item in findings.headlines:
        console.print(Text(item.first, style="" if item.about_networks else "bold"))
        for sentence in (item.seeds, *item.others):
            console.print(Text(sentence))
    for note in findings.notes:
        console.print(Text(note))
    for table in findings.tables:
        console.print()
        console.print(_to_rich(table, console.width))
    about_networks = any(item.about_networks for item in findings.headlines)
    console.print(Text(LEGEND + ABOUT_NETWORKS if about_networks else LEGEND))


def _to_rich(table: MetricTable, width: int) -> Table:
    for_names = max(20, width - WIDTH_OF_NUMBERS)
    widths = {"class": 2 * for_names // 5, "trainer": 3 * for_names // 5}
    shown = Table(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name, most in widths.items():
        shown.add_column(name, max_width=most, overflow="fold")
    for name in NUMBERS:
        shown.add_column(name, justify="right", no_wrap=True)
    for name, rows in table.groups.items():
        for row in rows:
            mark = "*" if row.verdict in ("better", "worse") else ""
            cells = ["" if row.number else name, _wrap(row.trainer, widths["trainer"])]
            cells += [row.mean, row.difference + mark, row.interval, row.p, row.counts]
            # text that looks like rich's markup stays text
            shown.add_row(*map(Text, cells), end_section=row is rows[-1])
    return shown


def _wrap(name: str, width: int) -> str:
    """Lines that break before an underscore if they can.

    >>> _wrap("nnUNetTrainerLoMix_short_seed0", 18)
    'nnUNetTrainerLoMix\\n_short_seed0'
    """
    return "\n".join(line.replace(" _", "_") for line in wrap(name.replace("_", " _"), width)) or name


# page


def to_html(findings: Findings) -> str:
    """The page."""
    source = findings.result.source
    names = _name_values(source.labels)
    overlays, undrawn = _draw_overlays(findings, list(names))
    colours = dict(zip(names, cycle(CLASS_COLOURS), strict=False))
    in_pictures = set[int]().union(*(overlay.values for overlay in overlays.values()))
    return _read_template("report.html", autoescape=True).render(
        report=findings,
        symbols=plots.SYMBOLS,
        draw_differences=lambda table, trainer: _draw(plots.draw_differences, table, findings.trainers, trainer),
        draw_distributions=lambda table: _draw(plots.draw_distributions, table, findings.trainers),
        curves=None if source.curves.empty else _draw(plots.draw_curves, source.curves, findings.trainers),
        trainers_with_curves=[trainer for trainer in findings.trainers if trainer in set(source.curves["trainer"])],
        overlays=overlays,
        undrawn=undrawn,
        legend={name: colours[value] for value, name in names.items() if value in in_pictures},
        several_seeds=len(source.predictions) > len(findings.trainers),
        without_images=len(source.images) < len(source.references),
    )


def _fold(name: str) -> Markup:
    """Lets a browser break a trainer's name behind nnUNetTrainer and before an underscore."""
    return Markup("<wbr>").join(map(escape, re.split(r"(?<=^nnUNetTrainer)|(?=_)", name)))


def _draw(draw: Callable[..., str], *arguments: Any) -> Markup:
    """An SVG, or a line in its place: a picture that fails must not cost the page."""
    try:
        return Markup(draw(*arguments))
    except Exception as error:
        return Markup('<p class="soft">This picture could not be drawn ({}).</p>').format(_explain(error))


def _explain(error: Exception) -> str:
    return str(error) if isinstance(error, LoMixError) else describe_error(error)


def _draw_overlays(findings: Findings, values: list[int]) -> tuple[dict[str, Overlays], list[str]]:
    """Pictures of the cases that differ most, and those that can't be drawn, each with the reason."""
    drawn, undrawn = {}, []
    for case in list(findings.differing)[:SHOWN_CASES]:
        try:
            drawn[case] = draw_overlays(findings.result.source, case, values)
        except Exception as error:  # as for _draw
            undrawn.append(f"{case} ({_explain(error)})")
    return drawn, undrawn


def _name_values(classes: dict[str, tuple[int, ...]]) -> dict[int, str]:
    """For each value of a segmentation the classes, or regions, that it belongs to.

    >>> _name_values({"organ": (1, 2), "tumour": (2,)})
    {1: 'organ', 2: 'organ + tumour'}
    """
    foreground = sorted(set[int]().union(*classes.values()) - {0})
    return {value: " + ".join(name for name, own in classes.items() if value in own) for value in foreground}
