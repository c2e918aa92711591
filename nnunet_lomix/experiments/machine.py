"""Where the trainings of an experiment run: the loop, and what each kind of machine has to do in it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments.display import Display
from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.preparation import Todo, find_todo
from nnunet_lomix.experiments.training import ACTIVE, State, States, Training, read_state


class Machine(ABC):
    """Runs trainings; a subclass for each kind of place.

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
    def submit(self, todo: Todo) -> None:
        """Have what is ready run as soon as there is room, and after what it needs is prepared.

        Raises:
            LoMixError: it can't.
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

    def run(self, display: Display, retry: bool) -> tuple[States, Mapping[Training, str]]:
        """Start what can start, until nothing runs or can start any more.

        Args:
            display: shows the states on the way.
            retry: run failed trainings, too.

        Returns:
            The states at the end, and what trainings wait for that couldn't start.

        Raises:
            LoMixError: something can't be prepared or submitted, or there was an interrupt.
        """
        tried: set[Training] = set()
        try:
            for states in self._watch(display):
                # nor is what somebody ends meanwhile, or takes out of a queue, started again by this command
                tried.update(training for training, state in states.items() if state in ACTIVE)
                # the second stage of a cascade may have become ready
                todo = find_todo(t for t in find_unfinished(states, retry) if t not in tried)
                if todo.ready:
                    self.submit(todo)
                    tried.update(todo.ready)
                elif not self.is_busy(states):
                    break
        except KeyboardInterrupt:
            raise LoMixError(self.interrupted) from None
        finally:
            self.stop()
        return states, todo.waiting

    def _watch(self, display: Display) -> Iterator[States]:
        """The states, again and again; a network or a scheduler that is away for a moment ends nothing."""
        states = self.read_states()
        while True:
            display.show(states)
            yield states
            states = {}
            while not states:
                self.wait()
                try:
                    states = self.read_states()
                except (LoMixError, OSError) as error:
                    display.tell(f"{error} Looking again.")


def find_unfinished(states: States, retry: bool) -> list[Training]:
    """What is to be run."""
    chosen = {State.MISSING, State.INTERRUPTED} | ({State.FAILED} if retry else set())
    return [training for training, state in states.items() if state in chosen]
