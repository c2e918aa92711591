"""The benchmark that interrupts real trainings, with nnU-Net's own command."""

import importlib
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.end_to_end
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def faults(monkeypatch):
    """Python forgets it at the end, as its modules have common names."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("faults")
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def test_what_real_trainings_lose(faults, own_results):
    nnunet = own_results("classes")
    variables = faults.training_variables(nnunet.variables, epochs=2)
    reference, killed = (
        faults.Training(nnunet.folder / name, "Dataset701_classes", variables) for name in ("whole", "killed")
    )
    kills = [(faults.Moment(7, writing=True, delay=0.01), signal.SIGKILL)]  # the second checkpoint of the first epoch
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(reference.run)
        rows = faults.interrupt(killed, kills)
        assert whole.result() == 0, reference.output
    (row,) = faults.judge(rows, killed, reference)
    assert row["exit"] == -signal.SIGKILL and row["equal"] and row["epochs_lost"] <= 1
