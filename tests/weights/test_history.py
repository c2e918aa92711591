"""The table of a training: written, read, refused."""

import numpy as np
import pandas as pd
import pytest
import torch

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.loss.maps import list_maps
from nnunet_lomix.nnunet.results import FoldFolder
from nnunet_lomix.weights.history import parse_map, plot_history, read_history, write_history

from ..nnunet.test_checkpoints import a_checkpoint

WEIGHTS = {"z_0": 0.2, "z_1": 0.1, "add_0_1": 0.4, "multiply_0_1": 0.1, "add_0_2": 0.2}


@pytest.fixture
def fold(tmp_path):
    (tmp_path / "fold_0").mkdir()
    return FoldFolder(tmp_path / "fold_0")


def test_table_has_a_row_an_epoch(fold):
    write_history([{}, WEIGHTS, WEIGHTS], fold.path)
    table = pd.read_csv(fold.path / "lomix_weights.csv", index_col="epoch")
    assert list(table.columns) == list(WEIGHTS) and list(table.index) == [0, 1, 2]
    assert table.loc[0].isna().all()
    np.testing.assert_allclose(table.loc[2], list(WEIGHTS.values()), rtol=1e-5)
    pd.testing.assert_frame_equal(read_history(fold), table)


def test_picture_of_an_epoch(fold):
    plot_history([{}, WEIGHTS], [parse_map(name) for name in WEIGHTS], fold.path)
    assert (fold.path / "lomix_weights.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(fold.path.iterdir())) == 1


@pytest.mark.parametrize("name", [m.name for m in list_maps(12, 4, ("add", "weighted_sum2"))])
def test_names_are_parsed(name):
    assert parse_map(name).name == name


def test_a_checkpoint_serves_where_there_is_no_table(fold):
    torch.save(a_checkpoint(lomix={"rule": "equal", "history": [WEIGHTS]}), fold.path / "checkpoint_latest.pth")
    assert read_history(fold).to_dict("records") == [WEIGHTS]
    torch.save(a_checkpoint(), fold.path / "checkpoint_final.pth")
    with pytest.raises(LoMixError, match="checkpoint_final.pth has no LoMix state"):
        read_history(fold)


@pytest.mark.parametrize("history", [[], [{}, {}]])
def test_a_checkpoint_that_lomix_only_saved_again_has_no_weights(fold, history):
    """A finished training of nnUNetTrainer, continued under LoMix's name, is only validated."""
    assert read_history(fold) is None
    torch.save(a_checkpoint(lomix={"rule": "barrier", "history": history}), fold.path / "checkpoint_final.pth")
    assert read_history(fold) is None


@pytest.mark.parametrize(
    "table, text",
    [
        ("", "can't be read"),
        ("a,b\n1,2", "can't be read"),
        ("epoch,z_0,foo\n0,1,2", "not a table of LoMix weights"),
        ("epoch,z_0,original_1\n0,1,2", "not a table of LoMix weights"),
        ("epoch,z_0\n0,1", "not a table of LoMix weights"),
        ("epoch,z_0,z_1\n0,1,many", "not a table of LoMix weights"),
        ("epoch,z_0,z_1\n", "not a table of LoMix weights"),
        ("epoch,z_0,z_1\n0,0.5,0.5\n1,,", "no weights for its last epoch"),
        ("epoch,z_0,z_1\n0,0.0,0.0", "no weights for its last epoch"),
        ("epoch,z_0,z_1\n0,1.5,-0.5", "no weights for its last epoch"),
    ],
)
def test_other_tables_are_refused(fold, table, text):
    (fold.path / "lomix_weights.csv").write_text(table)
    with pytest.raises(
        LoMixError, match=f"lomix_weights.csv .*{text}.*[:;] remove it, and the weights in the checkpoint are shown.$"
    ):
        read_history(fold)
