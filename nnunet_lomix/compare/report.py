"""The reports of a comparison: tables on the terminal and in Markdown, CSV, JSON, and one self-contained HTML file.

For people, Dice and NSD are in points (0 to 100) and HD95 in mm; in ``scores.csv`` and ``comparison.json``, Dice and
NSD are from 0 to 1.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats

from nnunet_lomix.compare import figures
from nnunet_lomix.compare.statistics import LOWER_IS_BETTER, MEAN
from nnunet_lomix.files import replacing

FACTORS = {"Dice": 100, "NSD": 100, "HD95": 1}
UNITS = {"Dice": "points", "NSD": "points", "HD95": "mm"}
SHOWN_CASES = 4
LEGEND = (
    "p: Wilcoxon's test, after Holm's correction. b:s:w: cases better:same:worse. "
    "*: better or worse by interval, test and seeds; all others are undecided."
)
MEASURES = [f"{a}{b}" for a in ("", "reference_", "difference_") for b in ("mean", "low", "high")]
MEASURES[MEASURES.index("difference_mean")] = "difference"


def write_report(
    folder: str | Path,
    scores: pd.DataFrame,
    comparison: pd.DataFrame,
    information: Mapping,
    curves: pd.DataFrame,
    files: Mapping[str, tuple[Path | None, Path, Mapping[str, Path]]],
    console: Console,
):
    """Write ``scores.csv``, ``comparison.json``, ``report.md`` and ``report.html``; print the tables.

    The numbers are written first, so that a picture that fails can't lose them, and printed last, as whoever reads them
    may leave; every file is whole or not there.

    Args:
        folder: where to write; made if it isn't there.
        scores: a row for each case, class, trainer, seed and metric; Dice and NSD from 0 to 1, HD95 in mm, never NaN.
        comparison: a row for each metric, class (the last is ``mean``) and candidate, as of ``compare.statistics``.
        information: any of ``dataset``, ``configuration``, ``folds``, ``classes`` (the values of each), ``metrics``
            (their implementation), ``tolerance_mm`` (of the NSD), ``notes`` (sentences), ``epoch_seconds`` (by
            trainer), ``versions`` (by package), ``label_source`` and ``date``; all of it goes into ``comparison.json``.
        curves: ``trainer``, ``seed``, ``fold``, ``epoch``, ``pseudo_dice``; may be empty.
        files: for each case its image (or None), its reference and each trainer's prediction; may be empty.
        console: where to print.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "scores.csv", scores.to_csv(index=False))
    _write(folder / "comparison.json", to_json(comparison, information))
    report = describe(scores, comparison, information)
    _write(folder / "report.md", to_markdown(report))
    try:
        _write(folder / "report.html", to_html(report, scores, comparison, information, curves, files))
    finally:
        print_tables(report, console)
    console.print(f"The report with pictures: {folder / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


def _write(path: Path, text: str):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(comparison: pd.DataFrame, information: Mapping) -> str:
    """Information and statistics; what is not a number is null."""
    rows = json.loads(comparison.to_json(orient="records", double_precision=15))
    units = {"Dice": "0 to 1", "NSD": "0 to 1", "HD95": "mm"}
    content = {"information": dict(information), "units": units, "comparison": rows}
    return json.dumps(content, indent=2, ensure_ascii=False, default=str)


def describe(scores: pd.DataFrame, comparison: pd.DataFrame, information: Mapping) -> dict:
    """All that the report says in words and tables.

    Returns:
        ``title``, ``trainers`` (the reference first), ``headlines`` (for each candidate ``verdict``, ``first``, the
        sentence on the first metric, and ``others``), ``notes``, ``tables`` (as of :func:`make_table`), ``extremes``,
        ``facts`` and ``methods``.
    """
    cases = scores["case"].nunique()
    trainers = [comparison["reference"].iloc[0], *comparison["trainer"].unique()]
    metrics = list(comparison["metric"].unique())
    means = comparison[comparison["class"] == MEAN]
    headlines = []
    for trainer in trainers[1:]:
        sentences = [headline(row, cases) for row in _records(means[means["trainer"] == trainer])]
        first = _records(means[means["trainer"] == trainer])[0]
        others = [describe_seeds(first), *sentences[1:]]
        headlines.append({"verdict": verdict(first), "first": sentences[0], "others": others})
    trained = information.get("configuration")
    return {
        "title": f"{information.get('dataset')} · {trained}" if trained else "Comparison",
        "trainers": trainers,
        "headlines": headlines,
        "notes": list(information.get("notes") or []),
        "tables": [make_table(comparison[comparison["metric"] == metric]) for metric in metrics],
        "extremes": _describe_extremes(scores, means),
        "facts": _list_facts(scores, trainers, information),
        "methods": describe_methods(scores, metrics, information),
    }


def _records(rows: pd.DataFrame) -> list[dict]:
    """The rows as dicts, with their numbers in the units that are shown."""
    rows = rows.copy()
    factors = rows["metric"].map(FACTORS)
    rows[MEASURES] = rows[MEASURES].mul(factors, axis=0)
    for column in ("by_seed", "reference_by_seed"):
        rows[column] = [[f * value for value in values] for f, values in zip(factors, rows[column], strict=True)]
    return rows.to_dict("records")


def verdict(row: Mapping) -> str:
    """``better`` or ``worse`` if interval, corrected test *and* trainings exclude no difference, else ``undecided``."""
    if not _excludes_zero(row) or not row["p_holm"] < 0.05 or not _trainings_agree(row):
        return "undecided"
    return "better" if (row["difference"] > 0) != (row["metric"] in LOWER_IS_BETTER) else "worse"


def _excludes_zero(row: Mapping) -> bool:
    return row["difference_low"] > 0 or row["difference_high"] < 0


def _trainings_agree(row: Mapping) -> bool:
    """Whether the interval over trainings excludes zero; a single training can't disagree."""
    low, high = interval_by_seed(row["by_seed"], row["reference_by_seed"])
    return not low <= 0 <= high


def interval_by_seed(candidate: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Welch's 95 % interval of the difference of two means over trainings; NaN for single ones.

    Trainings are no pairs: nothing but their order would say which seed of the candidate belongs to which.
    """
    if min(len(candidate), len(reference)) < 2:
        return np.nan, np.nan
    difference = np.mean(candidate) - np.mean(reference)
    parts = [np.var(values, ddof=1) / len(values) for values in (candidate, reference)]
    if not any(parts):
        return difference, difference
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (candidate, reference), strict=True))
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    return difference - half, difference + half


def headline(row: Mapping, cases: int) -> str:
    """A row of the means over classes, in the units that are shown, as a sentence."""
    metric, unit, size = row["metric"], UNITS[row["metric"]], row["difference"]
    ends = [row["difference_low"], row["difference_high"]]
    digits = 1 if min(map(abs, [size, *ends])) >= 0.05 or np.isnan(ends).any() else 2
    count = f"{cases} cases" if cases > 1 else "a single case"
    up, down = ("larger", "smaller") if metric in LOWER_IS_BETTER else ("higher", "lower")
    compared = (
        f"{row['trainer']}'s mean {metric} over {count} is {abs(size):.{digits}f} {unit} {up if size > 0 else down}"
    )
    if row["ties"] == cases:
        where = f"each of {count}" if cases > 1 else count
        return f"{row['trainer']} and {row['reference']} have the same mean {metric} in {where}."
    if np.isnan(ends).any():
        return f"{compared} than {row['reference']}'s; there is no interval, so it says nothing about other cases."
    if not _excludes_zero(row):
        return (
            f"{row['trainer']} and {row['reference']}: no difference in mean {metric} that these {count} can show "
            f"({signed(size, digits)} {unit}, 95 % interval {signed(ends[0], digits)} to {signed(ends[1], digits)})."
        )
    low, high = sorted(map(abs, ends))
    better = (size > 0) != (metric in LOWER_IS_BETTER)
    direction = f", which is {'better' if better else 'worse'}" if metric in LOWER_IS_BETTER else ""
    doubt = ""
    if not row["p_holm"] < 0.05:
        doubt = f", but the test doesn't confirm it (p = {format_p(row['p_holm'])})"
    elif not _trainings_agree(row):
        doubt = ", but other trainings may not show it"
    return (
        f"{compared} than {row['reference']}'s{direction} (95 % interval {low:.{digits}f} to {high:.{digits}f}){doubt}."
    )


def describe_seeds(row: Mapping) -> str:
    """What is known of the variance between trainings."""
    if len(row["by_seed"]) == len(row["reference_by_seed"]) == 1:
        return (
            "One training each: how much trainings with other seeds would differ isn't known, and not in the interval."
        )
    trainings = {row["trainer"]: row["by_seed"], row["reference"]: row["reference_by_seed"]}
    listed = ", ".join(f"{name} {' / '.join(f'{v:.1f}' for v in values)}" for name, values in trainings.items())
    sentence = f"Mean {row['metric']} by seed, {UNITS[row['metric']]}: {listed}"
    low, high = interval_by_seed(*trainings.values())
    if np.isnan(low):
        return f"{sentence}."
    over = "95 % interval of the difference over other trainings (Welch's t)"
    return f"{sentence}; {over}: {signed(low, 1)} to {signed(high, 1)}."


def make_table(rows: pd.DataFrame) -> dict:
    """The table of one metric as text.

    Returns:
        ``metric``, ``unit``, ``lower_is_better`` and ``groups``: for each class its ``name`` and ``rows``, one for each
        trainer, the reference first, of ``trainer``, ``number``, ``mean``, ``mean_interval``, ``difference``,
        ``interval``, ``p``, ``verdict`` and ``counts``.
    """
    metric = rows["metric"].iloc[0]
    groups = []
    for name in shown_classes(rows):
        records = _records(rows[rows["class"] == name])
        first = records[0]
        blank = dict.fromkeys(("difference", "interval", "p", "verdict", "counts"), "")
        mean = _format_mean(first, "reference_")
        lines = [{"trainer": first["reference"], "number": 0, **mean, **blank}]
        lines += [_format_candidate(record, i) for i, record in enumerate(records, 1)]
        groups.append({"name": str(name), "rows": lines})
    return {"metric": metric, "unit": UNITS[metric], "lower_is_better": metric in LOWER_IS_BETTER, "groups": groups}


def shown_classes(rows: pd.DataFrame) -> list[str]:
    """All classes and their mean; one class alone is its own mean."""
    classes = list(rows["class"].unique())
    return classes if len(classes) > 2 else classes[:1]


def _format_mean(row: Mapping, prefix: str) -> dict[str, str]:
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    interval = "–" if np.isnan([low, high]).any() else f"{low:.2f} to {high:.2f}"
    return {"mean": f"{row[f'{prefix}mean']:.2f}", "mean_interval": interval}


def _format_candidate(row: Mapping, number: int) -> dict:
    ends = [row["difference_low"], row["difference_high"]]
    return {
        "trainer": row["trainer"],
        "number": number,
        **_format_mean(
            {**row, "candidate_mean": row["mean"], "candidate_low": row["low"], "candidate_high": row["high"]},
            "candidate_",
        ),
        "difference": signed(row["difference"]),
        "interval": "–" if np.isnan(ends).any() else f"{signed(ends[0])} to {signed(ends[1])}",
        "p": format_p(row["p_holm"]),
        "verdict": verdict(row),
        "counts": f"{row['wins']}:{row['ties']}:{row['losses']}",
    }


def signed(value: float, digits: int = 2) -> str:
    """With sign, and the minus that is as wide as the plus.

    >>> signed(-1.234), signed(0.5, 1)
    ('−1.23', '+0.5')
    """
    return f"{value:+.{digits}f}".replace("-", "−")


def format_p(p: float) -> str:
    return "–" if np.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def by_case(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Scores of one metric in the unit that is shown, seeds averaged: a row for each case, columns (class, trainer).

    The classes are in their order in ``scores``, ``mean`` comes last; so are the trainers.
    """
    own = scores[scores["metric"] == metric]
    table = FACTORS[metric] * own.pivot_table(index="case", columns=["class", "trainer"], values="value", sort=False)
    means = table.T.groupby(level="trainer", sort=False).mean().T
    means.columns = pd.MultiIndex.from_product([[MEAN], means.columns], names=table.columns.names)
    return table.join(means)


def differences(scores: pd.DataFrame, metric: str, trainer: str, reference: str) -> pd.DataFrame:
    """Candidate − reference in the unit that is shown: a row for each case, a column for each class, and ``mean``."""
    table = by_case(scores, metric)
    return table.xs(trainer, axis=1, level="trainer") - table.xs(reference, axis=1, level="trainer")


def _describe_extremes(scores: pd.DataFrame, means: pd.DataFrame) -> list[dict[str, str]]:
    """For each candidate and metric the cases where it gains and loses most, by the mean over classes."""
    extremes = []
    for row in means.to_dict("records"):
        changes = differences(scores, row["metric"], row["trainer"], row["reference"])["mean"]
        unit = UNITS[row["metric"]]
        cells = {end: (row[end], f"{signed(changes[row[end]])} {unit}") for end in ("best", "worst")}
        extremes.append({"trainer": row["trainer"], "metric": row["metric"], **cells})
    return extremes


def _list_facts(scores: pd.DataFrame, trainers: Sequence[str], information: Mapping) -> dict[str, str]:
    seeds = scores.groupby("trainer")["seed"].nunique()
    times = information.get("epoch_seconds") or {}
    folds = information.get("folds")
    trained = information.get("configuration")
    folders = information.get("folders") or {}
    facts = {
        "dataset" if trained else "references": information.get("dataset"),
        "configuration": trained,
        "folds": ", ".join(map(str, folds)) if isinstance(folds, (list, tuple)) else folds,
        "labels": information.get("label_source"),
        "cases": scores["case"].nunique(),
        "classes": ", ".join(map(str, scores["class"].unique())),
        "trainings": ", ".join(f"{trainer} {seeds[trainer]}" for trainer in trainers),
        "seconds an epoch": ", ".join(f"{trainer} {times[trainer]:.1f}" for trainer in trainers if times.get(trainer)),
        "versions": ", ".join(f"{name} {version}" for name, version in (information.get("versions") or {}).items()),
        "date": information.get("date"),
        **{f"seeds of {name}" if len(own) > 1 else name: ", ".join(own) for name, own in folders.items()},
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def describe_methods(scores: pd.DataFrame, metrics: Sequence[str], information: Mapping) -> list[str]:
    """How the numbers were made and what they leave out, a paragraph each."""
    tolerance = information.get("tolerance_mm")
    implementation = information.get("metrics")
    scored = (
        "Dice and NSD are in points (0 to 100), HD95 in mm. Where reference and prediction are both empty, a class "
        "gets the best value (Dice and NSD 100, HD95 0); where only one is, the worst (Dice and NSD 0, HD95 the "
        "diagonal of the image). No case is dropped."
    )
    if "NSD" in metrics and tolerance is not None:
        scored += f" NSD counts a piece of surface as right within {tolerance:g} mm."
    if implementation:
        scored += f" Implementation of the metrics: {implementation}."
    several = scores["seed"].nunique() > 1
    paired = (
        "Trainers are compared on the same cases. "
        + ("Each trainer's seeds are averaged within a case first. " if several else "")
        + "The difference is the mean over cases of candidate − reference; its interval is a 95 % bootstrap over cases "
        "(bias-corrected and accelerated, BCa; expanded for few cases as by Hesterberg)."
    )
    test = (
        "p is of a two-sided Wilcoxon signed-rank test on the paired differences, corrected by Holm for all classes "
        "and candidates of a metric (for the mean over classes: for all candidates). A verdict other than undecided "
        "needs the interval and this test to exclude no difference, and with several seeds Welch's t interval over "
        "trainings, too; undecided doesn't mean equal. "
        "better:same:worse counts cases."
    )
    trainings = (
        "The means by seed show how much trainings vary, but that is not in the interval."
        if several
        else "With one training each, the variance between trainings is left out: it can exceed the difference."
    )
    left_out = (
        f"The interval is about other cases of the same kind, not about other trainings. {trainings} "
        "Cases of one patient count as if they were independent."
    )
    return [scored, paired, test, left_out]


def print_tables(report: Mapping, console: Console):
    """Print the headlines and a table for each metric, at most 80 columns wide."""
    for item in report["headlines"]:
        console.print(Text(item["first"], style="bold"))
        for sentence in item["others"]:
            console.print(Text(sentence))
    for note in report["notes"]:
        console.print(Text(note))
    for table in report["tables"]:
        console.print()
        console.print(_to_rich(table))
    console.print(Text(LEGEND))


def _to_rich(table: Mapping) -> Table:
    shown = Table(title=Text(title_of(table)), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    # names are folded: fits into 80 columns
    widths = {"class": 12, "trainer": 18, "mean": 6, "difference": 10, "95 % interval": 16, "p": 6, "b:s:w": 8}
    for name, width in widths.items():
        left = name in ("class", "trainer")
        shown.add_column(name, justify="left" if left else "right", max_width=width, overflow="fold")
    for group in table["groups"]:
        for i, row in enumerate(group["rows"]):
            mark = "*" * (row["verdict"] in ("better", "worse"))
            cells = [_wrap(row["trainer"], widths["trainer"]), row["mean"], row["difference"] + mark]
            cells += [row[key] for key in ("interval", "p", "counts")]
            shown.add_row(*map(Text, ["" if i else group["name"], *cells]), end_section=row is group["rows"][-1])
    return shown


def _wrap(name: str, width: int) -> str:
    """Lines that break before an underscore if they can.

    >>> _wrap("nnUNetTrainerLoMix_short_seed0", 18)
    'nnUNetTrainerLoMix\\n_short_seed0'
    """
    return "\n".join(line.replace(" _", "_") for line in wrap(name.replace("_", " _"), width)) or name


def title_of(table: Mapping) -> str:
    return f"{table['metric']}, {table['unit']}, {'lower' if table['lower_is_better'] else 'higher'} is better"


def to_markdown(report: Mapping) -> str:
    lines = [f"# {_plain(report['title'])}", ""]
    for item in report["headlines"]:
        lines += [f"**{_plain(item['first'])}** {' '.join(map(_plain, item['others']))}", ""]
    lines += [line for note in report["notes"] for line in (_plain(note), "")]
    header = [
        "class",
        "trainer",
        "mean",
        "95 % interval",
        "difference",
        "95 % interval",
        "p (Holm)",
        "verdict",
        "better:same:worse",
    ]
    keys = ("trainer", "mean", "mean_interval", "difference", "interval", "p", "verdict", "counts")
    for table in report["tables"]:
        rows = [[group["name"], *(row[key] for key in keys)] for group in table["groups"] for row in group["rows"]]
        lines += [f"## {title_of(table)}", "", *_to_markdown_table(header, rows), ""]
    header = ["trainer", "metric", "best case", "", "worst case", ""]
    rows = [[row["trainer"], row["metric"], *row["best"], *row["worst"]] for row in report["extremes"]]
    lines += ["## Best and worst cases", "", *_to_markdown_table(header, rows), "", "## How this was computed", ""]
    for paragraph in report["methods"]:
        lines += [_plain(paragraph), ""]
    lines += [f"- {name}: {_plain(value)}" for name, value in report["facts"].items()]
    return "\n".join(lines) + "\n"


def _to_markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *([_plain(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table, too."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", text).replace("\n", " ")


def to_html(
    report: Mapping,
    scores: pd.DataFrame,
    comparison: pd.DataFrame,
    information: Mapping,
    curves: pd.DataFrame,
    files: Mapping[str, tuple[Path | None, Path, Mapping[str, Path]]],
) -> str:
    """The page; arguments as of :func:`describe` and :func:`write_report`."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["folding"] = _fold
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    trainers = report["trainers"]
    metrics = [table["metric"] for table in report["tables"]]
    labels = information.get("classes")
    overlays, undrawn = _picture_overlays(scores, metrics[0], trainers, files, labels)
    return template.render(
        **report,
        symbols=figures.SYMBOLS,
        class_colours=figures.CLASS_COLOURS,
        title_of=title_of,
        differences=[
            _picture_differences(scores, comparison, metric, trainer, number)
            for number, trainer in enumerate(trainers[1:], 1)
            for metric in metrics
        ],
        distributions=[_picture_distributions(scores, comparison, metric, trainers) for metric in metrics],
        curves=None
        if curves.empty
        else Markup(figures.draw_curves(curves, trainers, f"Pseudo Dice over the epochs of {', '.join(trainers)}.")),
        overlays=overlays,
        undrawn=undrawn,
        legend=_name_labels(labels),
        several_seeds=scores["seed"].nunique() > 1,
        without_images=any(image is None for image, *_ in files.values()),
        cases=_list_cases(scores, metrics[0], trainers),
        first_metric=f"{metrics[0]}, {UNITS[metrics[0]]}",
    )


def _fold(name: str) -> Markup:
    """Lets a browser break a trainer's name behind nnUNetTrainer and before an underscore."""
    return Markup("<wbr>").join(map(escape, re.split(r"(?<=^nnUNetTrainer)|(?=_)", name)))


def _picture_differences(
    scores: pd.DataFrame, comparison: pd.DataFrame, metric: str, trainer: str, number: int
) -> dict[str, str]:
    rows = comparison[(comparison["metric"] == metric) & (comparison["trainer"] == trainer)]
    classes = shown_classes(rows)
    reference = rows["reference"].iloc[0]
    table = pd.DataFrame(_records(rows)).set_index("class").loc[classes]
    title = f"{metric} of {trainer} minus {reference}: " + ", ".join(
        f"{name} {signed(value)} {UNITS[metric]}" for name, value in table["difference"].items()
    )
    values = differences(scores, metric, trainer, reference)[classes]
    svg = figures.draw_differences(values, table, number, UNITS[metric], metric in LOWER_IS_BETTER, title)
    return {"metric": metric, "trainer": trainer, "number": number, "svg": Markup(svg)}


def _picture_distributions(
    scores: pd.DataFrame, comparison: pd.DataFrame, metric: str, trainers: Sequence[str]
) -> dict[str, str]:
    classes = shown_classes(comparison[comparison["metric"] == metric])
    values = by_case(scores, metric)[[(name, trainer) for name in classes for trainer in trainers]]
    medians = "; ".join(f"{name}, {trainer} {value:.2f}" for (name, trainer), value in values.median().items())
    title = f"{metric} of all cases, {UNITS[metric]}; medians: {medians}"
    direction = "← lower is better" if metric in LOWER_IS_BETTER else "higher is better →"
    svg = figures.draw_distributions(values, f"{UNITS[metric]}, {direction}", title)
    return {"metric": metric, "svg": Markup(svg)}


def _picture_overlays(
    scores: pd.DataFrame, metric: str, trainers: Sequence[str], files: Mapping, labels: Mapping | None
) -> tuple[list[dict], list[str]]:
    """The cases in which any candidate's first seed differs most from the reference's, the most different first.

    Returns:
        Their pictures, and the cases with files that can't be drawn.
    """
    means = by_case(scores[scores["seed"] == 0], metric)["mean"]  # the files are those of the first seed
    largest = means.sub(means[trainers[0]], axis=0).abs().max(axis=1).sort_values(ascending=False, kind="stable")
    values = None if labels is None else list(_name_labels(labels))
    overlays, undrawn = [], []
    for case in [case for case in largest.index[largest > 0] if case in files][:SHOWN_CASES]:
        image, reference, predictions = files[case]
        try:
            pictures, where = figures.draw_overlays(image, reference, predictions, values)
        except RuntimeError:  # SimpleITK reads less than nnU-Net's readers: oblique NIfTIs, for one
            undrawn.append(case)
            continue
        panels = [
            {
                "trainer": trainer,
                "number": trainers.index(trainer),
                "score": f"{means.loc[case, trainer]:.1f}",
                "png": base64.b64encode(png).decode(),
            }
            for trainer, png in pictures.items()
        ]
        overlays.append({"case": case, "where": where, "panels": panels})
    return overlays, undrawn


def _name_labels(labels: Mapping[str, int | Sequence[int]] | None) -> dict[int, str]:
    """For each value of a segmentation the classes, or regions, that it belongs to."""
    names: dict[int, list[str]] = {}
    for name, values in (labels or {}).items():
        for value in np.atleast_1d(values):
            names.setdefault(int(value), []).append(str(name))
    return {value: " + ".join(names[value]) for value in sorted(names) if value}


def _list_cases(scores: pd.DataFrame, metric: str, trainers: Sequence[str]) -> list[dict]:
    """Every case, from the largest loss of the first candidate to its largest gain."""
    means = by_case(scores, metric)["mean"][list(trainers)]
    gains = means.sub(means[trainers[0]], axis=0)
    order = gains[trainers[1]].sort_values(kind="stable").index
    return [
        {
            "case": case,
            "means": [f"{means.loc[case, trainer]:.2f}" for trainer in trainers],
            "gains": [signed(gains.loc[case, trainer]) for trainer in trainers[1:]],
        }
        for case in order
    ]
