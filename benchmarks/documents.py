"""The tables of the Markdown documents, made from the results.

A document has a pair of comments where a table belongs, with the name of a function of ``TABLES`` and of a file in
``results``; what lies between them is replaced::

    <!-- table: loss loss_cpu.json -->
    <!-- end of table -->
"""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from results import FOLDER, HIGH, LOW, MEDIAN, Record, as_table, read_record

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.files import replacing

ROOT = Path(__file__).parents[1]
ON_A_GPU = "_cuda.json"  # files of results that only a machine with a GPU can write end so
TABLE = re.compile(r"(<!-- table: (\w+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def write_documents(root: Path = ROOT, results: Path = FOLDER) -> list[Path]:
    """Write every table of the README and of the documents in docs/ and benchmarks/ anew.

    Returns:
        The files that have changed.

    Raises:
        LoMixError: a document names a table that isn't there, or a file that isn't and needs no GPU.
    """
    changed = []
    for document in list_documents(root):
        before = document.read_text()
        after = fill_tables(before, results)
        if after != before:
            with replacing(document) as temporary:
                temporary.write_text(after)
            changed.append(document)
    return changed


def list_documents(root: Path = ROOT) -> list[Path]:
    """Where tables may be."""
    return [root / "README.md", *sorted(root.glob("docs/*.md")), *sorted(root.glob("benchmarks/*.md"))]


def fill_tables(text: str, results: Path) -> str:
    """The text of a document with every table as the results say; see :func:`write_documents`."""

    def fill(match: re.Match[str]) -> str:
        start, table, name, end = match.groups()
        if table not in TABLES:
            raise LoMixError(f"There is no table {table!r}; choose from: {', '.join(TABLES)}")
        if not (results / name).exists() and name.endswith(ON_A_GPU):
            return f"{start}No GPU has run this yet.\n{end}"
        if not (results / name).exists():
            raise LoMixError(f"There are no results {name}: run the benchmark, python benchmarks/run.py …")
        record = read_record(results / name)
        return f"{start}{as_markdown(TABLES[table](record))}\n\n{describe(record)}\n{end}"

    return TABLE.sub(fill, text)


def as_markdown(table: pd.DataFrame) -> str:
    """As Markdown; numbers stay as they are written."""
    return table.to_markdown(index=False, disable_numparse=True)


def describe(record: Record) -> str:
    """How the results came about, in one line."""
    machine, versions = record["machine"], record["versions"]
    options = [f"--{name} {value}" for name, value in record["options"].items()]
    command = " ".join(["python benchmarks/run.py", record["benchmark"], *options])
    place = f"{machine['processor']}, {machine['cores']} cores"
    if machine["gpu"]:
        place = f"{machine['gpu']} ({place})"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    commit = f"commit {record['commit'][:9]}" if record["commit"] else "no commit"
    changes = " with changes" if record["dirty"] else ""
    return f"`{command}` on {record['date'][:10]}, {place}; {packages}; {commit}{changes}."


def loss_table(record: Record) -> pd.DataFrame:
    """Every row of ``loss``."""
    rows = as_table(record)
    return pd.DataFrame(
        {
            "case": rows["case"],
            "loss": rows["backend"] + rows["default"].map({True: " (default)", False: ""}),
            "maps": rows["maps"].map(str),
            "forward, ms": spreads(rows, "forward_ms"),
            "backward, ms": spreads(rows, "backward_ms"),
            "both, ms": spreads(rows, "full_ms"),
            "memory, MB": whole(rows["memory_mb"]),
            "error": ["" if pd.isna(error) else f"{error:.0e}" for error in rows["error"]],
        }
    )


def memory_table(record: Record) -> pd.DataFrame:
    """Every row of ``memory``."""
    rows = as_table(record)
    memory = whole(rows["memory_mb"])
    return pd.DataFrame(
        {"case": rows["case"], "loss": rows["backend"], "maps": rows["maps"].map(str), "memory, MB": memory}
    )


def step_table(record: Record) -> pd.DataFrame:
    """Every row of ``step``."""
    rows = as_table(record)
    table = {
        "case": rows["case"],
        "loss": rows["backend"].where(rows["backend"] == rows["computed_by"], "default (" + rows["computed_by"] + ")"),
        "maps": rows["maps"].map(str),
        "step, ms": spreads(rows, "step_ms"),
        "relative to nnU-Net": spreads(rows, "ratio", "{:.2f}"),
    }
    if rows["memory_mb"].notna().any():
        table["peak of memory, MB"] = whole(rows["memory_mb"])
    return pd.DataFrame(table)


def kernels_table(record: Record) -> pd.DataFrame:
    """The rows of ``kernels`` that say what is compiled."""
    return rows_with("registers", record, "{:.0f}")


def estimate_table(record: Record) -> pd.DataFrame:
    """The rows of ``kernels`` that say how long a loss should take."""
    return rows_with("slabs", record, "{:.3g}")


def rows_with(column: str, record: Record, form: str) -> pd.DataFrame:
    """The rows that have this column, with all others that they have; numbers as text."""
    rows = as_table(record)
    rows = rows[rows[column].notna()].dropna(axis=1)
    rows = rows.assign(**rows.select_dtypes("number").map(form.format))
    return rows.rename(columns=lambda name: name.replace("_ms", ", ms"))


def gpu_table(record: Record) -> pd.DataFrame:
    """The aims: the loss of the maps by the trainer's default, nnU-Net's own, and the ratio of two steps or epochs."""
    rows = rows_of_parts(record, "loss", "step", "epochs")
    backend = "fused" if "fused" in set(rows["what"]) else "plain"
    return pd.DataFrame(
        [
            {
                "case": case,
                "LoMix's maps, ms (stride 1)": with_other(
                    find(rows, case, backend, "full_ms.median"),
                    find(rows, case, f"{backend}, stride 1", "full_ms.median"),
                ),
                "nnU-Net's loss, ms": find(rows, case, "nnU-Net", "full_ms.median"),
                "step / nnUNetTrainer's (without torch.compile)": find(
                    rows, case, "nnUNetTrainerLoMix", "epoch_ratio", ".2f"
                )
                or with_other(
                    find(rows, case, "default, compiled", "ratio.median", ".2f"),
                    find(rows, case, "default", "ratio.median", ".2f"),
                ),
            }
            for case in rows["case"].unique()
        ]
    )


def gpu_kernels_table(record: Record) -> pd.DataFrame:
    """Milliseconds of the kernels alone, in brackets those estimated for an H100; launches and copies."""
    rows = rows_of_parts(record, "kernels")
    times = {part: number_column(rows, f"estimate.{part}_ms") for part in ("forward", "backward", "products", "memory")}
    estimates = {
        "forward": times["forward"],
        "backward": times["backward"],
        "other": times["products"] + times["memory"],
    }
    table = pd.DataFrame({"case": rows["case"], "loss": rows["what"], "maps": whole(number_column(rows, "maps"))})
    for part, measured in (("forward", "forward_kernel"), ("backward", "backward_kernel"), ("other", "other")):
        numbers = zip(number_column(rows, f"{measured}_ms"), estimates[part], strict=True)
        table[f"{part}, ms (estimate)"] = [with_other(as_number(ms), as_number(other)) for ms, other in numbers]
    table["launches"] = whole(number_column(rows, "launches"))
    table["copies"] = whole(number_column(rows, "copies"))
    return table


def gpu_checks_table(record: Record) -> pd.DataFrame:
    """Errors of the kernels, how the tests went, and everything that has failed."""
    rows = as_table(record)
    error = number_column(rows, "error").map(lambda number: as_number(number, ".0e"))
    result = text_column(rows, "failure") + text_column(rows, "summary") + error
    table = rows[["part", "case", "what"]].assign(result=result)
    return table[table["result"] != ""]


def rows_of_parts(record: Record, *parts: str) -> pd.DataFrame:
    """The rows of these parts of the benchmark ``gpu`` that have not failed."""
    rows = as_table(record)
    return rows[rows["part"].isin(parts) & (rows["what"] != "failure")]


def find(rows: pd.DataFrame, case: str, what: str, column: str, form: str = ".4g") -> str:
    """The number that a row of a case has in a column, as text; none if there isn't one."""
    numbers = number_column(rows, column)[(rows["case"] == case) & (rows["what"] == what)].dropna()
    return as_number(numbers.iloc[0], form) if len(numbers) else ""


def number_column(rows: pd.DataFrame, column: str) -> pd.Series:
    """A column of numbers; NaN if nothing has it."""
    return rows[column] if column in rows else pd.Series(float("nan"), rows.index)


def text_column(rows: pd.DataFrame, column: str) -> pd.Series:
    """A column of texts; empty where there is none."""
    return rows[column].fillna("") if column in rows else pd.Series("", rows.index)


def as_number(number: float, form: str = ".3g") -> str:
    """As text, an unknown one as none."""
    return "" if pd.isna(number) else format(number, form)


def with_other(text: str, other: str) -> str:
    """A text with another one in brackets, if there is one."""
    return f"{text} ({other})".strip() if other else text


def spreads(rows: pd.DataFrame, column: str, form: str = "{:.4g}") -> list[str]:
    """A median with the 20th and 80th percentile in brackets, for each row."""
    numbers = rows[[column + part for part in (MEDIAN, LOW, HIGH)]]
    texts = numbers.map(form.format)
    return [f"{median} ({low} to {high})" for median, low, high in texts.itertuples(index=False)]


def whole(numbers: pd.Series) -> pd.Series:
    """Whole numbers as text, an unknown one as none."""
    return numbers.map(lambda number: "" if pd.isna(number) else f"{number:.0f}")


TABLES: dict[str, Callable[[Record], pd.DataFrame]] = {
    "loss": loss_table,
    "memory": memory_table,
    "step": step_table,
    "kernels": kernels_table,
    "estimate": estimate_table,
    "gpu": gpu_table,
    "gpu_kernels": gpu_kernels_table,
    "gpu_checks": gpu_checks_table,
}
