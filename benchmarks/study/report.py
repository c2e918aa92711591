"""The study's table, from its CSV files."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

REFERENCE = "nnUNetTrainer"


def write_report(folder: Path):
    """Write ``table.md`` beside the CSV files and print it."""
    tables = summarise(pd.read_csv(folder / "dice.csv"), pd.read_csv(folder / "curves.csv"))
    text = "\n".join(f"### {title}\n\n{table.to_markdown(index=False)}\n" for title, table in tables.items())
    (folder / "table.md").write_text(text)
    print(text)


def summarise(dice: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A table for each dataset, size and number of steps: every arm against nnUNetTrainer, on the seeds both have.

    A case counts with the mean over its classes and over the seeds; the interval is a BCa bootstrap over cases. How
    much the difference varies from seed to seed stands beside it.
    """
    tables = {}
    for (dataset, size, steps), group in dice.groupby(["dataset", "size", "steps"], sort=False):
        cases = group.groupby(["arm", "seed", "case"], sort=False)["dice"].mean().unstack("case")
        if REFERENCE not in cases.index:
            continue
        chosen = curves[(curves["dataset"] == dataset) & (curves["size"] == size) & (curves["steps"] == steps)]
        seconds = chosen.groupby("arm")["seconds"].median()
        rows = [row(cases, arm, seconds) for arm in dict.fromkeys(cases.index.get_level_values("arm"))]
        tables[f"{dataset}, {size}, {steps} steps"] = pd.DataFrame(rows)
    return tables


def row(cases: pd.DataFrame, arm: str, seconds: pd.Series) -> dict:
    ours, theirs = cases.loc[arm], cases.loc[REFERENCE]
    seeds = ours.index.intersection(theirs.index)
    differences = 100 * (ours.loc[seeds] - theirs.loc[seeds])
    by_seed = differences.mean(axis=1)
    result = {"arm": arm, "seeds": len(ours), "Dice": f"{100 * ours.to_numpy().mean():.2f}"}
    if arm == REFERENCE:
        return result | {"difference": "", "95 % interval (cases)": "", "by seed": "", "time": "1.00"}
    by_case = differences.mean(axis=0).to_numpy()
    low, high = bootstrap((by_case,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    return result | {
        "difference": f"{by_case.mean():+.2f}",
        "95 % interval (cases)": f"{low:+.2f} to {high:+.2f}",
        "by seed": ", ".join(f"{d:+.1f}" for d in by_seed),
        "time": f"{seconds[arm] / seconds[REFERENCE]:.2f}",
    }
