"""The gate between engine and method: sound updates pass, one per client; a bad one is dropped with its reason.

What is sound follows from the task: the server installs what it sent on its own base, with the method's own `install`, and
asks for what came out: the same names, shapes and dtypes. No method has to describe its messages a second time.
"""

import math
from collections.abc import Callable, Iterable, Iterator

from ubsmoe.config import RoundSettings
from ubsmoe.errors import RoundError
from ubsmoe.messages import Dropped, Reply, Task, Update
from ubsmoe.methods.method import Method
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for
from ubsmoe.server.checks import Rejected, UpdateSpec, check_update, spec_of


def update_spec(model: SparseModel, method: Method, task: Task) -> UpdateSpec:
    """What an update to this task looks like. The base is left as it was found."""
    try:
        hooks = method.install(model, task.payload, task.profile, generator_for("form"))
        counts = model.expert_tokens()
        return UpdateSpec(spec_of(model.adapter), spec_of(hooks.extras()), (counts.shape, counts.dtype))
    finally:
        model.clear()


class Gate:
    """One round's gate: `ask` notes the tasks as they go out, `passed` checks what comes back.

    Args:
        form: what an update to a task looks like; asked only when one is there, so that no client is training then.
        settings: [rounds].
        elastic: whether clients train some steps at a smaller K.
        wanted: how many updates the round is for; a `quorum` of them must pass, at least one if any is wanted.
        drop: hears of every client that does not count.
        fault: what the method finds wrong with an update of the right form, as `Method.fault`.
    """

    def __init__(
        self,
        form: Callable[[Task], UpdateSpec],
        settings: RoundSettings,
        elastic: bool,
        wanted: int,
        drop: Callable[[Dropped], None],
        fault: Callable[[Update], str | None] = lambda update: None,
    ) -> None:
        self._method_fault = fault
        self._form, self._settings, self._elastic, self._drop = form, settings, elastic, drop
        self._quorum = max(min(1, wanted), math.ceil(settings.quorum * wanted - 1e-9))
        self._asked: dict[str, Task] = {}
        self._round = 0

    def ask(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """The same tasks, remembered until their answers are there."""
        for task in tasks:
            self._asked[task.profile.client], self._round = task, task.round
            yield task

    def passed(self, replies: Iterable[Reply]) -> Iterator[Update]:
        """The updates that count.

        Raises:
            RoundError: at the end, if fewer than the quorum did.
        """
        count = 0
        for reply in replies:
            if fault := self._fault(reply):
                self._drop(fault)
            elif isinstance(reply, Update):
                count += 1
                yield reply
        if count < self._quorum:
            raise RoundError(
                f"round {self._round}: {count} updates count, rounds.quorum asks for {self._quorum}; the checkpoint before "
                "it is intact. See the events for why clients were dropped, then start again to go on; where it was by "
                "chance, the same would be dropped again ([simulation], poisson sampling): lower rounds.quorum first"
            )

    def _fault(self, reply: Reply) -> Dropped | None:
        task = self._asked.pop(reply.client, None)
        if isinstance(reply, Dropped):
            return reply
        try:
            if task is None:
                raise Rejected("nothing was asked of this client, or it has answered already")
            check_update(reply, task, self._form(task), self._settings.max_change, self._elastic)
            if fault := self._method_fault(reply):
                raise Rejected(fault)
        except Rejected as reason:
            return Dropped(reply.client, self._round, "validation", str(reason))
        return None
