"""The study's table and pictures, from its CSV files.

python benchmarks/study/report.py benchmarks/study/results        # writes them
python benchmarks/study/report.py benchmarks/study/results ARM    # prints the table with this arm as reference
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

REFERENCE = "nnUNetTrainer"
GROUP = ["dataset", "size", "steps", "optimiser"]
SCORES = {"dice": "Dice", "nsd": "NSD", "cldice": "clDice"}
COLUMNS = 4  # of panels


def write_report(folder: Path) -> None:
    """Write the tables and the pictures beside the CSV files, and print the tables."""
    scores, curves = (read_table(folder, name) for name in ("scores", "curves"))
    text = as_text({**summarise(scores), "Outputs, each against z_0 of the same runs": outputs(scores)})
    (folder / "table.md").write_text(text)
    if (figure := draw_curves(curves)) is not None:
        figure.savefig(folder / "curves.png", dpi=90)
    print(text)


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """A table of the study, each row with what the run was."""
    return pd.read_csv(folder / f"{name}.csv").merge(pd.read_csv(folder / "runs.csv"), on="run")


def as_text(tables: dict[str, pd.DataFrame]) -> str:
    return "\n".join(
        f"### {title}\n\n{table.fillna('').to_markdown(index=False, disable_numparse=True)}\n"
        for title, table in tables.items()
        if len(table)
    )


def summarise(scores: pd.DataFrame, reference: str = REFERENCE) -> dict[str, pd.DataFrame]:
    """A table for each dataset, size, number of steps and optimiser: every arm against the reference, by z_0."""
    tables = {}
    for key, group in scores[scores["output"] == "z_0"].groupby(GROUP, sort=False):
        runs = {arm: own.set_index(["seed", "case"]) for arm, own in group.groupby("arm", sort=False)}
        if reference in runs:
            rows = [{"arm": arm} | compare(own, runs[reference], arm == reference) for arm, own in runs.items()]
            dataset, size, steps, optimiser = key
            tables[f"{dataset}, {size}, {steps} steps of {optimiser}"] = pd.DataFrame(rows)
    return tables


def outputs(scores: pd.DataFrame) -> pd.DataFrame:
    """Every other output of an arm against z_0 of the same runs."""
    rows = []
    for key, group in scores.groupby([*GROUP, "arm"], sort=False):
        own = {output: cases.set_index(["seed", "case"]) for output, cases in group.groupby("output", sort=False)}
        names = dict(zip([*GROUP, "arm"], key, strict=True))
        rows += [names | {"output": name} | compare(cases, own["z_0"]) for name, cases in own.items() if name != "z_0"]
    return pd.DataFrame(rows)


def compare(ours: pd.DataFrame, theirs: pd.DataFrame, is_reference: bool = False) -> dict[str, Any]:
    """Mean scores in points, and the differences to the reference with their intervals; indices are (seed, case).

    Seeds count that both have.
    """
    both = ours.index.intersection(theirs.index)
    row: dict[str, Any] = {"seeds": both.get_level_values("seed").nunique()}
    for column, name in SCORES.items():
        score = 100 * ours.loc[both, column]
        if score.notna().all():
            row[name] = f"{score.mean():.2f}"
            if not is_reference and theirs.loc[both, column].notna().all():  # earlier runs have Dice alone
                differences = (score - 100 * theirs.loc[both, column]).unstack("case").sort_index()
                row[f"{name}, difference"] = f"{differences.to_numpy().mean():+.2f}{interval(differences)}"
                if column == "dice":
                    row["by seed"] = ", ".join(f"{d:+.1f}" for d in differences.mean(axis=1))
    return row


def interval(differences: pd.DataFrame, draws: int = 10_000) -> str:
    """The 95 % interval of the mean of differences (seeds × cases) over redrawn seeds and redrawn patients.

    Several cases of a patient (ACDC: two frames) are drawn together. With fewer than three seeds there is none.
    """
    if len(differences) < 3:
        return ""
    by_patient = differences.T.groupby(differences.columns.str.replace(r"_frame\d+$", "", regex=True)).mean().T
    rng = np.random.default_rng(0)
    seeds, patients = (rng.multinomial(n, np.full(n, 1 / n), draws) / n for n in by_patient.shape)
    means = ((seeds @ by_patient.to_numpy()) * patients).sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f" ({low:+.2f} to {high:+.2f})"


def draw_curves(curves: pd.DataFrame) -> Figure | None:
    """Pseudo Dice over the training, a panel for each dataset, size, number of steps and optimiser; mean over seeds.

    The arms that every panel has are in colour, the others in grey. What a single arm was run for has no panel;
    without any panel there is no picture.
    """
    panels = [(key, panel) for key, panel in curves.groupby(GROUP, sort=False) if panel["arm"].nunique() > 1]
    if not panels:
        return None
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 4 * rows), layout="constrained")
    common = set.intersection(*(set(panel["arm"]) for _, panel in panels))
    for i, ((dataset, size, steps, optimiser), panel) in enumerate(panels):
        ax = figure.add_subplot(rows, COLUMNS, i + 1)
        for arm, runs in panel.groupby("arm", sort=False):
            mean = runs.groupby("epoch")["pseudo_dice"].mean()
            style = {"linewidth": 2, "label": arm, "zorder": 3} if arm in common else {"color": "0.75", "linewidth": 1}
            ax.plot((mean.index + 1) * steps / len(mean), mean, **style)
        title = f"{dataset.partition('_')[2]}, {size}, {optimiser}"
        ax.set(title=title, xlabel="training steps", ylabel="pseudo Dice of z_0")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, loc="lower right")
    return figure


if __name__ == "__main__":
    folder, *reference = sys.argv[1:]
    if reference:
        print(as_text(summarise(read_table(Path(folder), "scores"), *reference)))
    else:
        write_report(Path(folder))
