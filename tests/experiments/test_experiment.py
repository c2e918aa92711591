"""What an experiment is, from a file and from options."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_lomix.errors import LoMixError, UsageError
from nnunet_lomix.experiments import SCHEDULERS
from nnunet_lomix.experiments.experiment import Experiment, read_experiment

FILE = """\
datasets: [4, 027, 010]
configurations: 2d
trainers: [nnUNetTrainer, nnUNetTrainerLoMix]
folds: [00, all]
slurm: {partition: gpu, time: 24:00:00}
"""


def test_a_file_and_options_in_place_of_its_entries(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(FILE)
    read = read_experiment(file, {})
    assert read == Experiment(
        datasets=("4", "027", "010"),  # in YAML 1.1 these are 23 and 8
        configurations=("2d",),
        trainers=("nnUNetTrainer", "nnUNetTrainerLoMix"),
        folds=("0", "all"),
        schedulers={"slurm": {"partition": "gpu", "time": "24:00:00"}},  # and this is 86400
    )
    changed = read_experiment(file, {"datasets": ("7",), "jobs": 3, "slurm": None, "folds": (), "out": "here"})
    assert changed.datasets == ("7",) and changed.jobs == 3 and changed.out == "here"
    assert (changed.folds, changed.schedulers) == (read.folds, read.schedulers)
    changed = read_experiment(file, {"slurm": {"time": "1:00:00", "gres": "gpu:1"}})
    assert changed.schedulers == {"slurm": {"partition": "gpu", "time": "1:00:00", "gres": "gpu:1"}}
    options = {"datasets": ("4/",), "configurations": ("2d", "3d_fullres"), "trainers": ("A",)}
    assert read_experiment(None, options) == Experiment(("4",), ("2d", "3d_fullres"), ("A",))


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ("trainer: A", "'trainer' is not an entry of an experiment: did you mean trainers?"),
        (
            "xyz: 1",
            "there are datasets, configurations, trainers, plans, folds, results, options, device, gpus, jobs, ",
        ),
        ("datasets: {a: 1}", "datasets must be a list of names or numbers"),
        ("datasets: [1, []]", "datasets must be a list of names or numbers"),
        ("datasets: [1, '']", "datasets must be a list of names or numbers"),
        ("options: --c", "options has --c, but may have --npz"),
        ("options: -pretrained_weights no.pth", "-pretrained_weights needs a file, and there is no 'no.pth'"),
        ("options: [--npz, -num_gpus]", "-num_gpus needs a number, not ''"),
        ("results: [a, ./a]", "results has an entry twice"),
        ("folds: [0, 00]", "folds has an entry twice"),
        ("folds: [5a]", "folds must be numbers or all, such as [0, 1] in a file and -f 0 1, not '5a'"),
        ("folds: [-1]", "folds must be numbers or all"),
        ("jobs: 0", "jobs must be a number from 1 on"),
        ("jobs: yes", "jobs must be a number from 1 on"),
        ("trainers: ../A", "trainers must be names, not paths"),
        ("device: gpu", "device must be one of cuda, cpu, mps"),
        ("device: cpu\ngpus: 0", "gpus don't go with the device cpu"),
        ("jobs: 2\ngpus: 0", "jobs don't go with gpus"),
        ("slurm: gpu", "slurm must be sbatch's options, such as 'partition: gpu'"),
        ("out: [3]", "out must be a text, not ['3']"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_a_wrong_entry_gets_one_sentence_that_names_it_and_the_file(tmp_path, entries, sentence):
    file = tmp_path / "plan.yaml"
    file.write_text(f"datasets: 1\nconfigurations: 2d\ntrainers: A\n{entries}")
    with pytest.raises(LoMixError) as error:
        read_experiment(file, {})
    assert sentence in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"- datasets", "is not an experiment"),
        (b"", "is not an experiment"),
        (b"[" * 1000, "is not YAML"),
        (b"datasets: \xff\xfe", "is not YAML"),
        (None, "can't be read: No such file"),
    ],
)
def test_what_is_no_plan(tmp_path, content, sentence):
    file = tmp_path / "plan.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LoMixError, match=f"plan.yaml {sentence}") as error:
        read_experiment(file, {})
    assert "\n" not in str(error.value)


def test_what_is_required():
    with pytest.raises(UsageError, match="configurations, trainers must be given"):
        read_experiment(None, {"datasets": ("1",)})


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
    for name in ("Dataset001_A", "Dataset002_B"):
        (tmp_path / name).mkdir()
    seeds = tuple(str(tmp_path / name) for name in ("a", "b"))
    experiment = Experiment(("Dataset001_A", "Dataset002_B"), ("2d",), ("X", "Y"), folds=("0", "1", "2"), results=seeds)
    trainings = experiment.list_trainings()
    assert len(set(trainings)) == 2 * 2 * 3 * 2
    last = trainings[-1]
    assert last.folder.path == tmp_path / "b/Dataset002_B/Y__nnUNetPlans__2d/fold_2"
    assert last.name == "Dataset002_B/Y__nnUNetPlans__2d/fold_2 of seed 1"
    assert last.variables() == {"nnUNet_results": str(tmp_path / "b")}
