"""Trainings that are interrupted: by signals, kills, full disks, and others in their folder."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.checkpoints import read_checkpoint
from nnunet_lomix.nnunet.results import BEST, FINAL, LATEST
from nnunet_lomix.trainers import nnUNetTrainerLoMix
from nnunet_lomix.trainers.base import BaseTrainer
from nnunet_lomix.trainers.emcad import EMCADTrainer
from nnunet_lomix.trainers.signals import SIGNALS

from .conftest import LoMixTiny, StockTiny, Tiny, assert_same, assert_same_training, batch, log_of, send_behind

pytestmark = pytest.mark.end_to_end
TIMES = ("epoch_start_timestamps", "epoch_end_timestamps")
_UNINTERRUPTED = []  # -> uninterrupted


def uninterrupted(make):
    """A trainer after a whole training, the same for all tests."""
    if not _UNINTERRUPTED:
        trainer = make(LoMixTiny)
        trainer.run_training()
        (Path(trainer.output_folder) / FINAL).unlink()
        _UNINTERRUPTED.append(trainer)
    return _UNINTERRUPTED[0]


def go_on(make):
    """A new trainer that goes on as nnU-Net's ``--c`` does."""
    trainer = make(LoMixTiny)
    folder = Path(trainer.output_folder)
    trainer.load_checkpoint(str(next(folder / name for name in (FINAL, LATEST, BEST) if (folder / name).exists())))
    return trainer


def assert_same_end(a, b):
    for part in ("network", "loss", "optimizer", "loss_optimizer"):
        assert_same_training(getattr(a, part).state_dict(), getattr(b, part).state_dict())
    logs = [{k: v for k, v in t.logger.get_checkpoint().items() if k not in TIMES} for t in (a, b)]
    assert_same_training(*logs)
    assert a._best_ema == b._best_ema and a.current_epoch == b.current_epoch


@pytest.mark.parametrize(
    "hook, call, epoch, steps",
    [
        ("on_train_start", 1, 0, 0),
        ("train_step", 3, 1, 3),
        ("validation_step", 3, 1, 4),
        ("on_epoch_end", 2, 2, 4),
        ("on_train_end", 1, 3, 6),
    ],
)
def test_a_signal_costs_the_epoch_under_way_at_most(make, hook, call, epoch, steps):
    first, number = make(LoMixTiny), SIGNALS[steps % len(SIGNALS)]
    send_behind(first, hook, call, number)
    with pytest.raises(SystemExit) as ended:
        first.run_training()
    assert ended.value.code == 128 + number
    sentence = f"The training has stopped in epoch {epoch}; it begins anew, with the weights as they are: continue"
    if epoch == 3:
        sentence = "The training has ended, its validation hasn't begun: do that"
    assert log_of(first).endswith(f"{number.name}: {sentence} by the same command with --c. \n")

    checkpoint = read_checkpoint(Path(first.output_folder) / (LATEST if epoch < 3 else FINAL))
    assert {len(log) for log in checkpoint["logging"].values()} == {epoch}
    assert len(checkpoint["lomix"]["history"]) == checkpoint["current_epoch"] == epoch
    assert_same(checkpoint["network_weights"], first.network.state_dict())
    second = go_on(make)
    # a step under way has ended, with that of the loss's own optimiser; the offset of the grid is made of their number
    assert second.loss.rule.steps == steps
    assert [state["step"] for state in second.loss_optimizer.state.values()][:1] == [steps] * (steps > 0)
    second.run_training()
    assert second.loss.rule.steps == steps + 2 * (3 - epoch)
    assert {len(log) for log in second.logger.get_checkpoint().values()} == {3}
    if steps == 2 * epoch:  # an epoch had ended: nothing is done twice
        assert_same_end(uninterrupted(make), second)
    assert "maybe some logging issue" not in log_of(second)


def test_a_failure_behind_the_last_epoch_that_a_signal_caused_leaves_a_checkpoint(make):
    trainer = make(LoMixTiny)
    on_epoch_end = trainer.on_epoch_end

    def fail_in_the_end():
        on_epoch_end()
        if trainer.current_epoch == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("a rank has gone")

    trainer.on_epoch_end = fail_in_the_end
    with pytest.raises(SystemExit) as ended:
        trainer.run_training()
    assert ended.value.code == 128 + signal.SIGTERM and "has stopped in epoch 3; it begins anew" in log_of(trainer)
    assert read_checkpoint(Path(trainer.output_folder) / LATEST)["current_epoch"] == 3


def test_a_signal_that_ends_the_data_loaders_as_well_leaves_a_checkpoint(make):
    """As where a scheduler sends it to all processes of a job; those that are left are ended."""

    def batches():
        yield from [batch(trainer, 0)] * 3
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("One or more background workers are no longer alive.")

    loader, finished = Mock(__next__=lambda self: batch(trainer, 0)), []
    loader._finish = lambda: finished.append(True)  # else its processes write tracebacks behind our last sentence
    trainer = make(LoMixTiny)
    trainer.get_dataloaders = lambda: (batches(), loader)
    with pytest.raises(SystemExit) as ended:
        trainer.run_training()
    assert ended.value.code == 128 + signal.SIGTERM and finished == [True]
    assert go_on(make).loss.rule.steps == 3


def test_a_killed_training_goes_on_as_if_nothing_had_been(make):
    first = make(LoMixTiny)
    first.seconds_between_checkpoints = 0.0
    send_behind(first, "train_step", 5, signal.SIGINT)  # Ctrl-C, which ends it at once
    with pytest.raises(KeyboardInterrupt):
        first.run_training()
    second = go_on(make)
    assert second.current_epoch == 2
    second.run_training()
    assert_same_end(uninterrupted(make), second)


def test_a_training_that_is_not_interrupted_is_nnunets_to_the_last_bit(make):
    class Ours(Tiny, BaseTrainer):
        seconds_between_checkpoints = 0.0

    trainers = [make(cls) for cls in (StockTiny, Ours)]
    for trainer in trainers:
        torch.manual_seed(1)
        trainer.run_training()
    stock, ours = (torch.load(Path(t.output_folder, FINAL), weights_only=False) for t in trainers)
    for checkpoint in (stock, ours):
        del checkpoint["trainer_name"], checkpoint["init_args"]
        for key in TIMES:
            del checkpoint["logging"][key]
    assert_same_training(stock, ours)


def test_what_our_trainers_set_or_override_is_nnunets(make):
    """A new nnU-Net that gives one of these another name would be overridden in vain, without a word."""
    stock = vars(make(nnUNetTrainer, initialize=False))
    assert {"num_epochs", "initial_lr", "weight_decay", "grad_scaler"} <= stock.keys()
    own = {"check", "parts_not_finite", "add_state", "load_state", "make_loss"}
    own |= {"configure_loss_optimizer", "step_loss_optimizer"}
    for trainer in (BaseTrainer, nnUNetTrainerLoMix, EMCADTrainer):
        methods = {name for name, value in vars(trainer).items() if callable(value) or isinstance(value, staticmethod)}
        hooks = {name for name in methods - own if not name.startswith("_")}
        assert len(hooks) >= 3 and not {hook for hook in hooks if not hasattr(nnUNetTrainer, hook)}
    assert hasattr(nnUNetTrainer, "_build_loss") and hasattr(nnUNetTrainer, "_get_deep_supervision_scales")


def test_a_training_in_another_thread_goes_without_signals(make):
    trainer = make(LoMixTiny)
    trainer.num_epochs = 1
    thread = threading.Thread(target=trainer.run_training)
    thread.start()
    thread.join()
    assert (Path(trainer.output_folder) / FINAL).exists()
    assert "it isn't in the main thread" in log_of(trainer)


@pytest.mark.parametrize(("seconds", "every", "epochs"), [(0.0, 50, [1, 2]), (600.0, 2, [2])])
def test_the_latest_checkpoint_is_written_by_the_clock(make, seconds, every, epochs):
    class Clocked(LoMixTiny):
        seconds_between_checkpoints = seconds

        def on_epoch_start(self):
            latest = Path(self.output_folder, LATEST)
            self.seen = [*getattr(self, "seen", []), *([read_checkpoint(latest)] if latest.exists() else [])]
            super().on_epoch_start()

    trainer = make(Clocked)
    trainer.save_every = every
    trainer.run_training()
    assert [checkpoint["current_epoch"] for checkpoint in trainer.seen] == epochs
    # nnU-Net would write it before it knows whether the epoch was the best
    emas = trainer.logger.get_value("ema_fg_dice", None)
    assert [checkpoint["_best_ema"] for checkpoint in trainer.seen] == [max(emas[:epoch]) for epoch in epochs]


def test_without_checkpoints_a_signal_says_so(make):
    trainer = make(LoMixTiny)
    trainer.disable_checkpointing = True
    send_behind(trainer, "train_step")
    with pytest.raises(SystemExit):
        trainer.run_training()
    assert log_of(trainer).endswith("stopped in epoch 0; no checkpoint was written, as these are disabled. \n")
    assert not list(Path(trainer.output_folder).glob("*.pth*"))


@pytest.fixture
def largest_file():
    """Sets the size of the largest file that may be written, as a quota does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or limits[0], limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_old_checkpoint_and_a_sentence(make, largest_file):
    trainer = make(LoMixTiny)
    stock, file = Path(trainer.output_folder, "stock.pth"), Path(trainer.output_folder, LATEST)
    nnUNetTrainer.save_checkpoint(trainer, str(stock))
    trainer.save_checkpoint(str(file))
    old, files = file.read_bytes(), sorted(file.parent.iterdir())
    # the first file that is written is nnU-Net's, the second one has our state, too
    sizes = [len(old) // 50, len(old) // 2, (stock.stat().st_size + len(old)) // 2]
    assert stock.stat().st_size < sizes[2] < len(old)
    for size in sizes:
        largest_file(size)
        with pytest.raises(LoMixError) as ended:
            trainer.save_checkpoint(str(file))
        assert str(ended.value).startswith(f"{file} could not be written (")
        assert str(ended.value).endswith("the one that was there is intact. Make room, and continue with --c.")
        assert file.read_bytes() == old and sorted(file.parent.iterdir()) == files
        largest_file(None)
    trainer.save_checkpoint(str(file))
    read_checkpoint(file)


def test_an_error_while_a_checkpoint_is_written(make, monkeypatch, tmp_path):
    trainer = make(LoMixTiny)
    for error, shown, sentence in [
        (OSError(28, "No space left on device"), LoMixError, "could not be written .No space left on device.; there"),
        # what torch says of a GPU has nothing to do with the disk, and keeps its traceback
        (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError, "^CUDA error"),
    ]:
        monkeypatch.setattr(torch, "save", Mock(side_effect=error))
        with pytest.raises(shown, match=sentence):
            trainer.save_checkpoint(str(tmp_path / LATEST))


def test_a_second_process_in_the_folder_is_refused_before_it_writes(make):
    trainer = make(LoMixTiny)
    folder = Path(trainer.output_folder)
    left = folder / f"{BEST}.tmp.tmp"  # by a process that was killed
    left.touch()
    code = "import sys; from pathlib import Path; from nnunet_lomix.locks import Lock; "
    code += "lock = Lock(Path(sys.argv[1]), 'training'); print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        before = sorted(folder.parent.rglob("*"))
        for work in (trainer.run_training, trainer.perform_actual_validation):
            with pytest.raises(SystemExit, match=f"fold_0 is in use: training by process {other.pid} on .* end it"):
                work()
        assert sorted(folder.parent.rglob("*")) == before
        other.kill()
    trainer.num_epochs = 1
    trainer.run_training()
    assert not left.exists()


def test_a_folder_that_cannot_be_written_gets_a_sentence(make, tmp_path):
    trainer = make(LoMixTiny)
    (tmp_path / "file").touch()
    trainer.output_folder = str(tmp_path / "file")
    with pytest.raises(SystemExit, match="file can't be written"):
        trainer.run_training()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is no checkpoint, or is damaged, and was not loaded: copy it again, or remove it"),
        ({"optimizer_state": None}, "was written by LoMixTiny and doesn't fit LoMixTiny .*continue it as it was"),
        ({"network_weights": {}}, "was written by LoMixTiny and .*Missing key"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_remedy(make, tmp_path, content, sentence):
    file, trainer = tmp_path / "checkpoint_latest.pth", make(LoMixTiny)
    if content is None:
        file.write_bytes(os.urandom(5000))
    else:
        trainer.save_checkpoint(str(file))
        torch.save(torch.load(file, weights_only=False) | content, file)
    with pytest.raises(SystemExit, match=rf"^{file} {sentence}"):
        trainer.load_checkpoint(str(file))


@pytest.mark.parametrize(
    ("files", "workers", "sentence"),
    [
        ("splits_final.json", "0", r"^{folder}/splits_final.json is not a list of folds, .*: mend or remove it"),
        ("2d/case_?.b2nd", "0", r"^case_\d in {folder}/\S+2d can't be read, so run nnUNetv2_preprocess again: "),
        ("2d/case_?_seg.b2nd", "1", r"^case_\d in {folder}/\S+2d can't be read, so"),
    ],
)
def test_a_damaged_preprocessed_file_is_named_with_the_remedy(make, tmp_path, monkeypatch, files, workers, sentence):
    class Loading(nnUNetTrainerLoMix):
        epochs = 1

    monkeypatch.setenv("nnUNet_n_proc_DA", workers)
    trainer = make(Loading)
    stock = trainer.preprocessed_dataset_folder_base
    folder = shutil.copytree(stock, tmp_path / "preprocessed")
    trainer.preprocessed_dataset_folder_base = str(folder)
    trainer.preprocessed_dataset_folder = trainer.preprocessed_dataset_folder.replace(stock, str(folder))
    for file in folder.glob(files.replace("2d/", "*2d/")) if "/" in files else [folder / files]:
        file.write_bytes(b"damaged" * 100)
    with pytest.raises(SystemExit, match=sentence.format(folder=folder)):
        trainer.run_training()
