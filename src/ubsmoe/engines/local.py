"""The local engine: every client in this process, one after another, on one shared base."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ubsmoe.client import Trainer, train
from ubsmoe.data.tokens import Tokens
from ubsmoe.messages import Profile, Task, Update

Progress = Callable[[Task, int, int, float], None]


class LocalEngine:
    """Runs tasks where they are asked for. Updates come back in the order of the tasks, one in memory at a time."""

    def __init__(
        self, trainer: Trainer, examples: Mapping[str, Sequence[Tokens]], progress: Progress | None = None
    ) -> None:
        self._trainer, self._examples, self._progress = trainer, examples, progress

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Update]:
        """Train every task's client; lazily, so that the server can forget an update before the next one exists."""
        for task in tasks:
            yield train(self._trainer, task, self._examples[task.profile.client], self._report(task.profile, task))

    def _report(self, profile: Profile, task: Task) -> Callable[[int, int, float], None] | None:
        progress = self._progress
        if progress is None:
            return None
        return lambda step, num_steps, loss: progress(task, step, num_steps, loss)
