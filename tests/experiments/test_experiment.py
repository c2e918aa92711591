"""What an experiment is, from a file and from options."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_lomix.errors import LoMixError, UsageError
from nnunet_lomix.experiments import SCHEDULERS
from nnunet_lomix.experiments.experiment import Experiment, read_experiment

FILE = """\
datasets: [4, Dataset027_ACDC]
configurations: 2d
trainers: [nnUNetTrainer, nnUNetTrainerLoMix]
folds: [0, all]
slurm: {partition: gpu, time: "24:00:00"}
"""


@pytest.fixture
def plan(tmp_path) -> Path:
    file = tmp_path / "plan.yaml"
    file.write_text(FILE)
    return file


def test_a_file_and_options_in_place_of_its_entries(plan):
    read = read_experiment(plan, {})
    assert read == Experiment(
        datasets=("4", "Dataset027_ACDC"),
        configurations=("2d",),
        trainers=("nnUNetTrainer", "nnUNetTrainerLoMix"),
        folds=("0", "all"),
        schedulers={"slurm": {"partition": "gpu", "time": "24:00:00"}},
    )
    changed = read_experiment(plan, {"datasets": ("7",), "jobs": 3, "slurm": None, "folds": (), "out": "here"})
    assert changed.datasets == ("7",) and changed.jobs == 3 and changed.out == "here"
    assert (changed.folds, changed.schedulers) == (read.folds, read.schedulers)
    slurm = read_experiment(plan, {"slurm": {"time": "1:00:00", "gres": "gpu:1"}}).schedulers["slurm"]
    assert slurm == {"partition": "gpu", "time": "1:00:00", "gres": "gpu:1"}
    options = {"datasets": ("4/",), "configurations": ("2d", "3d_fullres"), "trainers": ("A",)}
    assert read_experiment(None, options) == Experiment(("4",), ("2d", "3d_fullres"), ("A",))


EXPERIMENT = "datasets: 1\nconfigurations: 2d\ntrainers: A\n"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("trainer: A", "'trainer' is not an entry of an experiment: did you mean trainers?"),
        ("devices: cpu", "did you mean device?"),
        ("xyz: 1", "there are datasets, configurations"),
        ("datasets: {a: 1}\nconfigurations: 2d\ntrainers: A", "datasets must be a list of names or numbers"),
        ("datasets: [1, []]\nconfigurations: 2d\ntrainers: A", "datasets must be a list of names or numbers"),
        ("datasets: [1, '']\nconfigurations: 2d\ntrainers: A", "datasets must be a list of names or numbers"),
        ("datasets: 1\nconfigurations: 2d\ntrainers: A\noptions: --c", "options has --c, but may have --npz"),
        (
            EXPERIMENT + "options: -pretrained_weights no.pth",
            "-pretrained_weights needs a file, and there is no 'no.pth'",
        ),
        (EXPERIMENT + "options: [--npz, -num_gpus]", "-num_gpus needs a number, not ''"),
        ("datasets: 1\nconfigurations: 2d\ntrainers: A\nresults: [a, ./a]", "results has an entry twice"),
        ("datasets: 1\nconfigurations: 2d\ntrainers: A\nfolds: [0, 00]", "folds has an entry twice"),
        ("datasets: 1\nconfigurations: 2d\ntrainers: A\njobs: 0", "jobs must be a number from 1 on"),
        ("datasets: 1\nconfigurations: 2d\ntrainers: A\njobs: yes", "jobs must be a number from 1 on"),
        (
            "datasets: 1\nconfigurations: 2d\ntrainers: A\nfolds: [5a]",
            "in a file and -f 0 1, not '5a'",
        ),
        (
            "datasets: 1\nconfigurations: 2d\ntrainers: A\nfolds: [-1]",
            "folds must be numbers or all, such as [0, 1] in",
        ),
        ("datasets: 1\nconfigurations: 2d\ntrainers: A\nfolds: [0, 0]", "folds has an entry twice"),
        ("datasets: 1\nconfigurations: 2d\ntrainers: ../A", "trainers must be names, not paths"),
        ("datasets: 1\nconfigurations: 2d\ntrainers: A\ndevice: gpu", "device must be one of cuda, cpu, mps"),
        ("datasets: 1\nconfigurations: 2d\ntrainers: A\ndevice: cpu\ngpus: 0", "gpus don't go with the device cpu"),
        ("datasets: 1\nconfigurations: 2d\ntrainers: A\nslurm: gpu", "slurm must be sbatch's options"),
        ("datasets: 1\nconfigurations: 2d\ntrainers: A\nout: [3]", "out must be a text, not ['3']"),
        ("- datasets", "is not an experiment"),
        ("", "is not an experiment"),
        ("datasets: [", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("[" * 5000, "is not YAML"),
    ],
)
def test_a_wrong_file_gets_one_sentence_that_names_file_and_entry(tmp_path, content, sentence):
    file = tmp_path / "plan.yaml"
    file.write_text(content)
    with pytest.raises(LoMixError) as error:
        read_experiment(file, {})
    assert sentence in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_numbers_are_read_as_they_are_written(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("datasets: [027, 010]\nconfigurations: 2d\ntrainers: A\nslurm: {time: 24:00:00}\nfolds: [00]")
    read = read_experiment(file, {"slurm": {"gres": "gpu:1"}})
    assert read.datasets == ("027", "010") and read.folds == ("0",)  # in YAML 1.1 they are 23 and 8
    assert read.schedulers["slurm"] == {"time": "24:00:00", "gres": "gpu:1"}  # and this is 86400


def test_what_is_required(tmp_path):
    with pytest.raises(UsageError, match="configurations, trainers must be given"):
        read_experiment(None, {"datasets": ("1",)})
    with pytest.raises(LoMixError, match="can't be read: No such file"):
        read_experiment(tmp_path / "none.yaml", {})
    (tmp_path / "latin.yaml").write_bytes(b"datasets: \xff\xfe")
    with pytest.raises(LoMixError, match="is not YAML"):
        read_experiment(tmp_path / "latin.yaml", {})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.fixed_dictionaries({}, optional=dict.fromkeys([*Experiment.__dataclass_fields__, *SCHEDULERS], ANYTHING)))
def test_any_entries_give_an_experiment_or_a_sentence(entries):
    try:
        experiment = read_experiment(None, entries)
    except LoMixError as error:
        assert "\n" not in str(error).replace("\\n", "")
    else:
        assert all(isinstance(name, str) and name.strip() for name in experiment.datasets + experiment.trainers)


def test_trainings_are_the_product(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    seeds = tuple(str(tmp_path / name) for name in ("a", "b"))
    experiment = Experiment(("Dataset001_A", "Dataset002_B"), ("2d",), ("X", "Y"), folds=("0", "1", "2"), results=seeds)
    trainings = experiment.list_trainings()
    assert len(set(trainings)) == 2 * 2 * 3 * 2
    last = trainings[-1]
    assert last.folder.path == tmp_path / "b/Dataset002_B/Y__nnUNetPlans__2d/fold_2"
    assert last.name == "Dataset002_B/Y__nnUNetPlans__2d/fold_2 of seed 1"
    assert last.variables() == {"nnUNet_results": str(tmp_path / "b")}
