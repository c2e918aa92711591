"""Where the trainings of an experiment run: the loop, and what each kind of machine has to do in it."""

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

from rich.console import Console

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments.display import showing, tell
from nnunet_lomix.experiments.experiment import Experiment
from nnunet_lomix.experiments.preparation import Todo, find_todo
from nnunet_lomix.experiments.training import ACTIVE, States, Training, read_state

SECONDS_BETWEEN_STATES = 10  # schedulers don't like to be asked often


class Machine(ABC):
    """Runs the trainings of an experiment; a subclass for each kind of place.

    What isn't abstract serves for schedulers: trainings go on without this process, which waits for them.
    """

    interrupted: str  # what an interrupt has done, a sentence

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.trainings = experiment.list_trainings()

    @property
    def device(self) -> str:
        """Of the trainings: "cuda", "cpu" or "mps"."""
        return self.experiment.device or "cuda"

    @property
    def options(self) -> list[str]:
        """Further arguments of nnUNetv2_train."""
        return ["-device", self.device, *self.experiment.options]

    @abstractmethod
    def check(self, dry_run: bool) -> None:
        """Raise a LoMixError for what can't run; in a dry run only for what couldn't run elsewhere, either."""

    @abstractmethod
    def submit(self, todo: Todo) -> None:
        """Have what is ready run as soon as there is room, and after what it needs is prepared.

        A scheduler notes the job of each training, with its own name: ``write_note({"job": …, "scheduler": "pbs"})``.
        A LoMixError says what it can't.
        """

    def is_busy(self, states: States) -> bool:
        """Whether there is something to wait for."""
        return not set(ACTIVE).isdisjoint(states.values())

    def wait(self) -> None:
        """Let the trainings run until it is time to read their states again."""
        time.sleep(SECONDS_BETWEEN_STATES)

    def stop(self) -> None:  # noqa: B027
        """End what mustn't outlive this process, and wait until it has ended."""

    def variables(self, number: int) -> dict[str, str]:
        """Environment variables of the training with a number, as it would be run by hand."""
        return {}

    def find_jobs(self, noted: Collection[str]) -> Collection[str]:
        """Those of some jobs that are in a queue, waiting or running; a LoMixError if the scheduler doesn't answer."""
        return ()

    def read_states(self) -> States:
        """How far all trainings are, now; a LoMixError if the scheduler doesn't answer."""
        notes = {training: training.read_note() for training in self.trainings}
        jobs = self.find_jobs({str(note["job"]) for note in notes.values() if "job" in note})
        return {training: read_state(training, note, jobs) for training, note in notes.items()}

    def run(self, console: Console, retry: bool) -> tuple[States, Mapping[Training, str]]:
        """Start what can start, failed trainings only with ``retry``, until nothing runs or can start any more.

        Returns the states at the end, and what trainings wait for that couldn't start.

        Raises:
            LoMixError: something can't be prepared or submitted, or there was an interrupt.
        """
        tried: set[Training] = set()
        with showing(console) as show:
            try:
                states = self.read_states()
                while True:
                    show(states)
                    # nor is what somebody ends meanwhile, or takes out of a queue, started again by this command
                    tried.update(training for training, state in states.items() if state in ACTIVE)
                    # the second stage of a cascade may have become ready
                    todo = find_todo(states, retry, tried)
                    if todo.ready:
                        self.submit(todo)
                        tried.update(todo.ready)
                    elif not self.is_busy(states):
                        return states, todo.waiting
                    states = self._wait_for_states(console)
            except KeyboardInterrupt:
                raise LoMixError(self.interrupted) from None
            finally:
                self.stop()

    def _wait_for_states(self, console: Console) -> States:
        """The next ones; a network or a scheduler that is away for a moment ends nothing."""
        while True:
            self.wait()
            try:
                return self.read_states()
            except (LoMixError, OSError) as error:
                tell(f"{error} Looking again.", console)
