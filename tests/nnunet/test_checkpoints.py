"""Reading checkpoints of strangers."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from nnunet_lomix.nnunet.checkpoints import CheckpointError, read_checkpoint


class Malicious:
    """Makes a file when it is unpickled without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def a_checkpoint(**more):
    logging = {"losses": [np.float32(1.5), np.float64(-2), np.int64(3)], "lrs": [0.1]}
    init = {"configuration": "2d", "device": torch.device("cpu")}
    return {
        "network_weights": {"w": torch.arange(3.0)},
        "trainer_name": "nnUNetTrainer",
        "init_args": init,
        "current_epoch": 2,
        "logging": logging,
        **more,
    }


def test_what_nnunet_writes_is_read(tmp_path):
    torch.save(a_checkpoint(), tmp_path / "c.pth")
    ours, stock = read_checkpoint(tmp_path / "c.pth"), torch.load(tmp_path / "c.pth", weights_only=False)
    assert torch.equal(ours.pop("network_weights")["w"], stock.pop("network_weights")["w"])
    assert ours == stock
    for a, b in zip(ours["logging"]["losses"], stock["logging"]["losses"], strict=True):
        assert type(a) is type(b)


def test_the_name_of_older_numpy_is_known(tmp_path):
    """numpy 1 wrote its numbers under another name; both have to be readable whichever numpy is installed."""
    old, new = (b"cnumpy.%s.multiarray\nscalar\n" % core for core in (b"core", b"_core"))

    class Renaming:
        """pickle, with the other name in the file."""

        Unpickler, load = pickle.Unpickler, pickle.load

        class Pickler(pickle._Pickler):
            def save_global(self, obj, name=None):
                if getattr(obj, "__name__", "") == "scalar":
                    self.write(old if name is None else new)
                    self.memoize(obj)
                else:
                    super().save_global(obj, name)

            dispatch = dict(pickle._Pickler.dispatch)
            dispatch[type(lambda: 0)] = save_global
            dispatch[type(len)] = save_global

    torch.save(a_checkpoint(), tmp_path / "c.pth", pickle_module=Renaming)
    data = (tmp_path / "c.pth").read_bytes()
    assert b"numpy.core.multiarray" in data and b"numpy._core.multiarray" not in data
    assert read_checkpoint(tmp_path / "c.pth")["logging"]["losses"][0] == 1.5


def test_code_is_refused_and_not_run(tmp_path):
    written = tmp_path / "written"
    for content in (a_checkpoint(x=Malicious(written)), Malicious(written)):
        torch.save(content, tmp_path / "c.pth")
        with pytest.raises(CheckpointError, match=r"has (posix|nt)\.mkdir in it"):
            read_checkpoint(tmp_path / "c.pth")
        assert not written.exists()
    torch.load(tmp_path / "c.pth", weights_only=False)  # the trap is a real one
    assert written.exists()


@pytest.mark.parametrize("value", [np.array(["a", None], dtype=object), np.str_("a"), np.complex64(1)])
def test_only_numbers_of_numpy_are_allowed(tmp_path, value):
    torch.save(a_checkpoint(x=value), tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="not loaded"):
        read_checkpoint(tmp_path / "c.pth")


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "c.pth"
    with pytest.raises(CheckpointError, match="can't be read: No such file"):
        read_checkpoint(file)
    torch.save(a_checkpoint(), file)
    whole = file.read_bytes()
    for content in (b"", b"hello", whole[:-100], np.random.default_rng(0).bytes(2000), pickle.dumps(a_checkpoint())):
        file.write_bytes(content)
        with pytest.raises(
            CheckpointError, match="c.pth .*was not loaded.*: copy it again, or remove it|; ask who made it"
        ):
            read_checkpoint(file)
    wrong = ({"network_weights": [1]}, {"network_weights": {"w": 1}}, {"current_epoch": "2"}, {"init_args": None})
    for content in ([1], {"state_dict": {}}, *(a_checkpoint(**w) for w in wrong)):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match="not a checkpoint of nnU-Net"):
            read_checkpoint(file)


@pytest.mark.parametrize("state", [5, {}, {"rule": "equal"}, {"rule": "equal", "history": 3}])
@pytest.mark.parametrize("epoch", [None, 3, {"z_0": "a"}])
def test_a_forged_state_is_refused(tmp_path, state, epoch):
    if epoch is not None:
        state = {"rule": "equal", "history": [epoch]}
    torch.save(a_checkpoint(lomix=state), tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="has a lomix that no trainer of nnunet_lomix writes"):
        read_checkpoint(tmp_path / "c.pth")


def test_threads_read_side_by_side(tmp_path):
    """What torch allows is a setting of the process: the thread that ends first took it away from the others."""
    torch.save(a_checkpoint(), tmp_path / "c.pth")
    with ThreadPoolExecutor(4) as pool:
        checkpoints = list(pool.map(read_checkpoint, [tmp_path / "c.pth"] * 60))
    assert all(checkpoint["logging"]["losses"] == [1.5, -2, 3] for checkpoint in checkpoints)
