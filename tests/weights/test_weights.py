"""The command: its files, and what it prints."""

import pandas as pd
from click.testing import CliRunner

from nnunet_lomix.cli import main

from .test_summary import FIRST, SECOND


def run(*folders, out, **options):
    runner = CliRunner(**options)
    result = runner.invoke(main, ["weights", *map(str, folders), "--out", str(out)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if line.startswith(" ")}
    return result.output, rows


def test_one_trainer(model, tmp_path):
    """Folds of unequal length, one of which began with a checkpoint of nnUNetTrainer."""
    out = tmp_path / "new" / "out"
    output, rows = run(model([{}, FIRST, SECOND], [SECOND]), out=out)
    assert output.startswith("Against equal weights scale 2 gained most (+20 %)")
    assert rows["folds"] == ["0,", "1"] and rows["epochs"] == ["1", "to", "3"] and rows["agreement"] == ["1.00"]
    assert rows["heaviest"] == ["add_0_1", "(1.80)"] and rows["lightest"] == ["multiply_0_1", "(0.30)"]
    assert rows["scale"] == ["2", "12.0", "+20", "%"] and rows["add"] == ["60.0", "+50", "%"]
    assert (out / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(out / "weights.csv")) == 4 * 5
    assert sorted(file.name for file in out.iterdir()) == ["weights.csv", "weights.png"]


def test_models_are_columns_with_their_own_means(model, tmp_path):
    """Before, T and U were pooled as if they were four folds of one training. With other maps, cells stay empty."""
    other = model([{"z_0": 0.5, "z_1": 0.3, "max_0_1": 0.2}], name="U__P__2d")
    output, rows = run(model([FIRST], [SECOND]), other, out=tmp_path / "out")
    assert "T: Against equal weights scale" in output and "U: Against equal weights scale" in output
    # original: 0.3 and 0.34 in T, where equal weights have 0.4
    assert rows["original"] == ["32.0", "(30.0", "to", "34.0)", "−20", "%", "80.0", "+20", "%"]
    assert rows["max"] == ["20.0", "−40", "%"]


def test_an_output_that_is_not_utf_8(model, tmp_path):
    """The sentence has a minus sign, which Windows' encoding of western Europe lacks."""
    output, _ = run(model([FIRST]), out=tmp_path / "out", charset="cp1252")
    assert "(?12 %)" in output
