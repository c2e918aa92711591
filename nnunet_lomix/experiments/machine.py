"""Where the trainings of an experiment run: what each kind of machine has to do."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.preparation import Preparation
from nnunet_lomix.experiments.training import States, Training, read_state


class Machine(ABC):
    """Runs trainings; a subclass for each place.

    Args:
        experiment: its trainings.

    Attributes:
        experiment: as given.
        trainings: all of the experiment.
        interrupted: what an interrupt has done, a sentence.

    Raises:
        LoMixError: a dataset isn't there, or a variable of nnU-Net is not set.
    """

    interrupted: str

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.trainings = experiment.list_trainings()

    @property
    @abstractmethod
    def device(self) -> str:
        """Of the trainings: "cuda", "cpu" or "mps"."""

    @property
    def options(self) -> list[str]:
        """Further arguments of nnUNetv2_train."""
        return ["-device", self.device, *self.experiment.options]

    @abstractmethod
    def check(self, dry_run: bool) -> None:
        """Refuse what can't run; for a dry run only what couldn't run elsewhere, either.

        Raises:
            LoMixError: the sentence says what.
        """

    @abstractmethod
    def submit(self, trainings: Sequence[Training], preparations: Sequence[Preparation]) -> None:
        """Have trainings run as soon as there is room, and after what they need is prepared.

        Raises:
            LoMixError: they can't.
        """

    @abstractmethod
    def is_busy(self, states: States) -> bool:
        """Whether there is something to wait for."""

    @abstractmethod
    def wait(self) -> None:
        """Let the trainings run until it is time to read their states again."""

    @abstractmethod
    def stop(self) -> None:
        """End what mustn't outlive this process, and wait until it has ended."""

    def variables(self, number: int) -> dict[str, str]:
        """Environment variables of the training with a number, as it would be run by hand."""
        return {}

    def find_jobs(self, noted: Collection[str]) -> Collection[str]:
        """Those of some jobs that are in a queue, waiting or running.

        Raises:
            LoMixError: the scheduler doesn't answer.
        """
        return ()

    def read_states(self) -> States:
        """How far all trainings are, now.

        Raises:
            LoMixError: the scheduler doesn't answer.
        """
        notes = {training: training.read_note() for training in self.trainings}
        jobs = self.find_jobs({str(note["job"]) for note in notes.values() if "job" in note})
        return {training: read_state(training, note, jobs) for training, note in notes.items()}
