"""Reading checkpoints of strangers."""

import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.checkpoints import read_checkpoint


class Malicious:
    """Makes a file when it is unpickled without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def a_checkpoint(**more):
    return {
        "network_weights": {"w": torch.arange(3.0)},
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "2d", "device": torch.device("cpu")},
        "current_epoch": 2,
        "logging": {"losses": [np.float32(1.5), np.float64(-2), np.int64(3)], "lrs": [0.1]},
        **more,
    }


@pytest.fixture
def file(tmp_path):
    torch.save(a_checkpoint(), tmp_path / "c.pth")
    return tmp_path / "c.pth"


def test_what_nnunet_writes_is_read(file):
    ours, stock = read_checkpoint(file), torch.load(file, weights_only=False)
    assert torch.equal(ours.pop("network_weights")["w"], stock.pop("network_weights")["w"])
    assert ours == stock
    for a, b in zip(ours["logging"]["losses"], stock["logging"]["losses"], strict=True):
        assert type(a) is type(b)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_the_names_of_older_and_newer_numpy_are_known(file, tmp_path, module):
    """numpy 1 wrote its numbers under another name; both have to be readable whichever numpy is installed."""
    found = 0
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(tmp_path / "other.pth", "w") as other:
        for name in archive.namelist():
            content = archive.read(name)
            for known in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
                found += content.count(known)
                content = content.replace(known, module)
            other.writestr(name, content)
    assert found and read_checkpoint(tmp_path / "other.pth")["logging"] == a_checkpoint()["logging"]


def test_code_is_refused_and_not_run(file, tmp_path):
    written = tmp_path / "written"
    for content in (a_checkpoint(x=Malicious(written)), Malicious(written)):
        torch.save(content, file)
        with pytest.raises(LoMixError, match=r"has (posix|nt)\.mkdir in it"):
            read_checkpoint(file)
        assert not written.exists()
    torch.load(file, weights_only=False)  # the trap is a real one
    assert written.exists()


@pytest.mark.parametrize("value", [np.array(["a", None], dtype=object), np.str_("a"), np.complex64(1)])
def test_only_numbers_of_numpy_are_allowed(file, value):
    torch.save(a_checkpoint(x=value), file)
    with pytest.raises(LoMixError, match="not loaded"):
        read_checkpoint(file)


def test_files_that_are_missing_or_damaged_are_refused(file, tmp_path):
    with pytest.raises(LoMixError, match="can't be read: No such file"):
        read_checkpoint(tmp_path / "no.pth")
    whole = file.read_bytes()
    for content in (b"", b"hello", whole[:-100], np.random.default_rng(0).bytes(2000), pickle.dumps(a_checkpoint())):
        file.write_bytes(content)
        with pytest.raises(LoMixError, match="c.pth .*was not loaded.*: copy it again, or remove it|; ask who made it"):
            read_checkpoint(file)


OTHERS = "is not a checkpoint of nnU-Net"
FORGED = "has a lomix that no trainer of nnunet_lomix writes"


@pytest.mark.parametrize(
    "content, message",
    [
        ([1], OTHERS),
        ({"state_dict": {}}, OTHERS),
        (a_checkpoint(network_weights=[1]), OTHERS),
        (a_checkpoint(network_weights={"w": 1}), OTHERS),
        (a_checkpoint(current_epoch="2"), OTHERS),
        (a_checkpoint(init_args=None), OTHERS),
        (a_checkpoint(lomix=5), FORGED),
        (a_checkpoint(lomix={"history": []}), FORGED),
        (a_checkpoint(lomix={"rule": "equal"}), FORGED),
        (a_checkpoint(lomix={"rule": "equal", "history": 3}), FORGED),
        (a_checkpoint(lomix={"rule": "equal", "history": [3]}), FORGED),
        (a_checkpoint(lomix={"rule": "equal", "history": [{"z_0": "a"}]}), FORGED),
    ],
)
def test_what_neither_nnunet_nor_our_trainers_write_is_refused(file, content, message):
    torch.save(content, file)
    with pytest.raises(LoMixError, match=message):
        read_checkpoint(file)


def test_threads_read_side_by_side(file):
    """What torch allows is a setting of the process: the thread that ends first took it away from the others."""
    with ThreadPoolExecutor(4) as pool:
        checkpoints = list(pool.map(read_checkpoint, [file] * 60))
    assert all(checkpoint["logging"]["losses"] == [1.5, -2, 3] for checkpoint in checkpoints)
