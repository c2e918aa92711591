"""Trainings that are interrupted: by signals, kills, full disks, and others in their folder."""

import importlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_lomix.nnunet.checkpoints import read_checkpoint
from nnunet_lomix.trainers import lomix, resumable
from nnunet_lomix.trainers.resumable import ResumableTrainer

from .conftest import LoMixTiny, StockTiny, Tiny, assert_same_training, batch

pytestmark = pytest.mark.end_to_end
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FINAL, LATEST, BEST = (f"checkpoint_{name}.pth" for name in ("final", "latest", "best"))
_UNINTERRUPTED = []  # -> uninterrupted
TIMES = ("epoch_start_timestamps", "epoch_end_timestamps")


class Interruptible(LoMixTiny):
    """Three epochs of three steps, each step on a batch of its own; in ``moment`` it sends itself a signal."""

    moment: tuple[str, int, int] | None = None  # what it does, the epoch, and the number of steps in it
    number = signal.SIGTERM

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.num_iterations_per_epoch = 3
        self.logger.plot_progress_png = lambda folder: None  # takes longer than the epoch

    def reach(self, what: str) -> None:
        if self.moment == (what, self.current_epoch, self.finished_steps):
            self.moment = None
            os.kill(os.getpid(), self.number)

    def get_dataloaders(self):
        super().get_dataloaders()
        return self.batches("waiting for a batch"), self.batches("validation")

    def batches(self, what):
        while True:
            self.reach(what)
            yield batch(self, 10 * self.current_epoch + self.finished_steps)

    def on_epoch_start(self):
        super().on_epoch_start()
        self.reach("start of the epoch")

    def train_step(self, batch):
        self.reach("step")
        result = super().train_step(batch)
        self.steps_of_the_subclass = getattr(self, "steps_of_the_subclass", 0) + 1
        return result

    def on_train_epoch_end(self, train_outputs):
        super().on_train_epoch_end(train_outputs)
        self.reach("end of the steps")

    def on_validation_epoch_end(self, val_outputs):
        super().on_validation_epoch_end(val_outputs)
        self.reach("end of the validation")

    def on_epoch_end(self):
        super().on_epoch_end()
        self.reach("end of the epoch")

    def on_train_end(self):
        self.reach("end of the training")
        super().on_train_end()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(lomix, "plot_history", lambda *args: None)


def uninterrupted(make):
    """A trainer after a whole training, the same for all tests."""
    if not _UNINTERRUPTED:
        trainer = make(Interruptible)
        trainer.run_training()
        (Path(trainer.output_folder) / FINAL).unlink()
        _UNINTERRUPTED.append(trainer)
    return _UNINTERRUPTED[0]


def run_until_interrupted(trainer) -> str:
    """Gives what its log says at the end."""
    before = [signal.getsignal(number) for number in (*resumable.SIGNALS, signal.SIGINT)]
    with pytest.raises(SystemExit) as ended:
        trainer.run_training()
    assert ended.value.code == 128 + trainer.number
    assert [signal.getsignal(number) for number in (*resumable.SIGNALS, signal.SIGINT)] == before
    return Path(trainer.log_file).read_text().strip().splitlines()[-1]


def go_on(make, cls):
    """A new trainer that goes on as nnU-Net's ``--c`` does."""
    trainer = make(cls)
    folder = Path(trainer.output_folder)
    trainer.load_checkpoint(str(next(folder / name for name in (FINAL, LATEST, BEST) if (folder / name).exists())))
    return trainer


def assert_same_end(a, b):
    for part in ("network", "loss", "optimizer", "loss_optimizer"):
        assert_same_training(getattr(a, part).state_dict(), getattr(b, part).state_dict())
    logs = [{k: v for k, v in t.logger.get_checkpoint().items() if k not in TIMES} for t in (a, b)]
    assert_same_training(*logs)
    assert {len(log) for log in b.logger.get_checkpoint().values()} == {a.num_epochs}
    assert a._best_ema == b._best_ema and a.current_epoch == b.current_epoch


@pytest.mark.parametrize(
    "moment, epoch, steps",
    [
        (("start of the epoch", 0, 0), 0, 0),
        (("waiting for a batch", 0, 0), 0, 0),
        (("step", 1, 0), 1, 1),
        (("waiting for a batch", 1, 2), 1, 2),
        (("step", 1, 2), 1, 3),
        (("end of the steps", 1, 3), 1, 3),
        (("validation", 1, 3), 1, 3),
        (("end of the validation", 1, 3), 2, 0),  # what follows takes a moment only
        (("end of the epoch", 2, 0), 2, 0),
        (("validation", 2, 3), 2, 3),
        (("end of the epoch", 3, 0), 3, 0),
        (("end of the training", 3, 0), 3, 0),
    ],
)
def test_a_signal_loses_nothing_and_repeats_nothing(make, moment, epoch, steps):
    whole = uninterrupted(make)
    first = make(Interruptible)
    first.moment = moment
    sentence = run_until_interrupted(first)
    first_steps = getattr(first, "steps_of_the_subclass", 0)
    if epoch < 3:
        assert f"SIGTERM: The training has stopped in epoch {epoch} after {steps} steps; nothing is lost:" in sentence
        assert "--c" in sentence
    else:
        assert "SIGTERM: The training has ended, its validation hasn't begun" in sentence

    saved = Path(first.output_folder) / (LATEST if epoch < 3 else FINAL)
    checkpoint = read_checkpoint(saved)
    assert {len(log) for log in checkpoint["logging"].values()} == {epoch}
    assert len(checkpoint["lomix"]["history"]) == checkpoint["current_epoch"] == epoch
    second = go_on(make, Interruptible)
    assert (second.current_epoch, second.finished_steps) == (epoch, steps)
    assert (second.loss.rule.steps, second.loss.stride) == (first_steps, 2)  # of which the offset of the grid is made
    second.run_training()
    assert first_steps + getattr(second, "steps_of_the_subclass", 0) == 9
    assert second.num_iterations_per_epoch == 3 and second.train_step.__func__ is Interruptible.train_step
    assert_same_end(whole, second)
    assert "maybe some logging issue" not in Path(second.log_file).read_text()


def test_a_training_may_be_interrupted_in_every_step(make):
    whole = uninterrupted(make)
    trainer = make(Interruptible)
    for epoch in range(3):
        for step in range(3):
            trainer.moment, trainer.number = ("step", epoch, step), signal.SIGUSR2
            assert "SIGUSR2: " in run_until_interrupted(trainer)
            trainer = go_on(make, Interruptible)
    trainer.run_training()
    assert_same_end(whole, trainer)


def test_stock_nnunet_goes_on_with_such_a_checkpoint(make):
    first = make(Interruptible)
    first.moment = ("step", 1, 1)
    run_until_interrupted(first)
    stock = make(StockTiny)
    stock.load_checkpoint(os.path.join(first.output_folder, LATEST))
    stock.num_epochs = 2
    stock.run_training()
    assert {len(log) for log in stock.logger.get_checkpoint().values()} == {2}


def test_a_training_that_is_not_interrupted_is_nnunets_to_the_last_bit(make):
    class Resumable(Tiny, ResumableTrainer):
        seconds_between_checkpoints = 0.0

    trainers = [make(cls) for cls in (StockTiny, Resumable)]
    for trainer in trainers:
        torch.manual_seed(1)
        trainer.logger.plot_progress_png = lambda folder: None
        trainer.run_training()
    stock, ours = (read_checkpoint_of_any(Path(t.output_folder, FINAL)) for t in trainers)
    for checkpoint in (stock, ours):
        for key in ("trainer_name", "init_args", "lomix"):
            checkpoint.pop(key, None)
        for key in TIMES:
            checkpoint["logging"].pop(key)
    assert_same_training(stock, ours)


def read_checkpoint_of_any(file):
    return torch.load(file, weights_only=False)


def test_a_second_signal_ends_the_training_at_once_but_not_an_echo(make, monkeypatch):
    ended = []
    monkeypatch.setattr(resumable, "_end_at_once", ended.append)
    trainer = make(LoMixTiny)
    trainer._listening_process = os.getpid()
    trainer._on_signal(signal.SIGTERM, None)
    trainer._on_signal(signal.SIGUSR2, None)
    assert ended == []
    trainer._signal_time -= 2
    trainer._on_signal(signal.SIGUSR2, None)
    assert ended == [signal.SIGUSR2]


def test_other_ranks_leave_the_first_signal_to_rank_0(make, monkeypatch):
    ended = []
    monkeypatch.setattr(resumable, "_end_at_once", ended.append)
    trainer = make(LoMixTiny)
    trainer._listening_process, trainer.local_rank = os.getpid(), 1
    trainer._let_signals_stop()
    trainer._on_signal(signal.SIGTERM, None)
    trainer._let_signals_stop()
    trainer._signal_time -= 2
    trainer._on_signal(signal.SIGTERM, None)
    assert ended == [signal.SIGTERM]
    assert not list(Path(trainer.output_folder).glob("*.pth"))


def test_a_forked_worker_ends_as_if_we_were_not_there(make):
    class Forking(Interruptible):
        def train_step(self, batch):
            if self.current_epoch == self.finished_steps == 0:
                ready, is_ready = os.pipe()
                child = os.fork()
                if child == 0:
                    os.write(is_ready, b"!")
                    time.sleep(60)
                    os._exit(0)
                os.read(ready, 1)
                os.kill(child, signal.SIGTERM)
                self.status = os.waitpid(child, 0)[1]
            return super().train_step(batch)

    trainer = make(Forking)
    trainer.num_epochs = 1
    trainer.run_training()
    assert os.WIFSIGNALED(trainer.status) and os.WTERMSIG(trainer.status) == signal.SIGTERM


def test_a_training_in_another_thread_goes_without_signals(make):
    trainer = make(Interruptible)
    trainer.num_epochs = 1
    thread = threading.Thread(target=trainer.run_training)
    thread.start()
    thread.join()
    assert (Path(trainer.output_folder) / FINAL).exists()
    assert "it isn't in the main thread" in Path(trainer.log_file).read_text()


@pytest.mark.parametrize("seconds, disabled, epochs", [(0.0, False, [1, 2]), (600.0, False, []), (0.0, True, [])])
def test_the_latest_checkpoint_is_written_by_the_clock(make, seconds, disabled, epochs):
    class Clocked(Interruptible):
        seconds_between_checkpoints = seconds

        def on_epoch_start(self):
            latest = Path(self.output_folder, LATEST)
            self.seen = [*getattr(self, "seen", []), *([read_checkpoint(latest)] if latest.exists() else [])]
            super().on_epoch_start()

    trainer = make(Clocked)
    trainer.disable_checkpointing = disabled
    trainer.run_training()
    assert [checkpoint["current_epoch"] for checkpoint in trainer.seen] == epochs
    # nnU-Net would write it before it knows whether the epoch was the best
    emas = trainer.logger.get_value("ema_fg_dice", None)
    assert [checkpoint["_best_ema"] for checkpoint in trainer.seen] == [max(emas[:epoch]) for epoch in epochs]
    assert trainer.save_every == 50


def test_without_checkpoints_a_signal_says_so(make):
    trainer = make(Interruptible)
    trainer.moment, trainer.disable_checkpointing = ("step", 0, 1), True
    assert "after 2 steps; no checkpoint was written, as these are disabled." in run_until_interrupted(trainer)
    assert not list(Path(trainer.output_folder).glob("*.pth*"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


# the first file that is written in a save is nnU-Net's, the second one has our state, too
@pytest.mark.parametrize("room", [0.02, 0.5, 1.02, 1.5])
def test_a_full_disk_leaves_the_old_checkpoint_and_a_sentence(make, small_disk, room):
    trainer = make(LoMixTiny)
    file = small_disk / LATEST
    trainer.save_checkpoint(str(file))
    size, old = file.stat().st_size, file.read_bytes()
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(b"x" * int(free - room * size))
    with pytest.raises(SystemExit) as ended:
        trainer.save_checkpoint(str(file))
    assert str(ended.value).startswith(f"{file} could not be written (") and "is left on its disk" in str(ended.value)
    assert str(ended.value).endswith("the one that was there is intact. Make room, and continue with --c.")
    assert file.read_bytes() == old
    read_checkpoint(file)
    assert sorted(path.name for path in small_disk.iterdir()) == [LATEST, "filler"]
    (small_disk / "filler").unlink()
    trainer.save_checkpoint(str(file))


def test_a_file_that_must_not_grow_ends_a_training_with_a_sentence(make):
    trainer = make(Interruptible)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # as a quota
    try:
        with pytest.raises(SystemExit, match=f"{BEST} could not be written .*; there was none before. Make room"):
            trainer.run_training()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(Path(trainer.output_folder).glob("*.pth*")) and trainer.save_every == 50


def test_an_error_of_torch_that_is_none_of_the_disk_is_shown_as_it_is(make, monkeypatch, tmp_path):
    def fail(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        make(LoMixTiny).save_checkpoint(str(tmp_path / LATEST))


def test_what_a_killed_process_left_is_removed(make):
    trainer = make(Interruptible)
    trainer.num_epochs = 0
    left = Path(trainer.output_folder, f"{BEST}.tmp.tmp")
    left.touch()
    trainer.run_training()
    assert not left.exists()


def test_a_second_process_in_the_folder_is_refused_before_it_writes(make):
    trainer = make(Interruptible)
    folder = Path(trainer.output_folder)
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


def test_a_folder_that_cannot_be_written_gets_a_sentence(make, tmp_path):
    trainer = make(LoMixTiny)
    (tmp_path / "file").touch()
    trainer.output_folder = str(tmp_path / "file")
    with pytest.raises(SystemExit, match="file can't be written"):
        trainer.run_training()


def test_numbers_that_steps_return_come_back_as_they_were(make):
    first = make(LoMixTiny)
    outputs = [{"loss": np.float32([0.1, 7])[i : i + 1].reshape(()), "cases": ["a"], "n": 3} for i in (0, 1)]
    first._outputs = outputs
    first._save_latest()
    second = go_on(make, LoMixTiny)
    assert second._outputs_before == outputs
    assert [o["loss"].dtype for o in second._outputs_before] == [np.float32] * 2
    assert read_checkpoint(Path(first.output_folder, LATEST))["current_epoch"] == 0


@pytest.fixture
def faults(monkeypatch):
    """The benchmark that kills real trainings. Python forgets it at the end, as its modules have common names."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("faults")
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def test_real_trainings_that_are_killed_end_as_if_nothing_had_been(faults, own_results):
    nnunet = own_results("classes")
    variables = faults.training_variables(nnunet.variables, epochs=2)
    reference, killed = (
        faults.Training(nnunet.folder / name, "Dataset701_classes", variables) for name in ("whole", "killed")
    )
    # the second checkpoint of the first epoch; the third step of the second epoch; and then the end of it
    plan = [
        (faults.Moment(7, writing=True, delay=0.01), signal.SIGKILL),
        (faults.Moment(4), signal.SIGTERM),
        (faults.Moment(3, delay=0.01), signal.SIGKILL),
    ]
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(reference.run)
        rows = faults.interrupt(killed, plan)
        assert whole.result() == 0, reference.output
    rows = faults.judge(rows, killed, reference)
    assert [row["exit"] for row in rows] == [-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGKILL]
    assert all(row["equal"] for row in rows)
    assert max(row["epochs_lost"] for row in rows) <= 1 and rows[1]["epochs_lost"] == 0
