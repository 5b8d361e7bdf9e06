"""Every update is validated before it is aggregated: an update that does not answer its task is dropped with the reason.

What is valid follows from the task: what the server sent is installed on a base without weights, with the method's own `install`.
The names, shapes and dtypes that come out are what an update must have. No method describes its messages a second time.
"""

import math

import torch

from ubsmoe.config import RunSettings
from ubsmoe.errors import RoundError, printable
from ubsmoe.messages import Dropped, Task, Tensors, Update
from ubsmoe.methods.method import Method
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for
from ubsmoe.server.update_checks import Rejected, check_update, most_tokens
from ubsmoe.wire.form import UpdateSpec, spec_of


class UpdateSpecs:
    """What an update to a task looks like, found once for each tier and form of payload.

    Args:
        skeleton: a base; names and shapes are all that is asked of it.
        method: the run's.
    """

    def __init__(self, skeleton: SparseModel, method: Method) -> None:
        self._skeleton, self._method = skeleton, method
        self._known: dict[tuple[object, ...], UpdateSpec] = {}

    def __call__(self, task: Task) -> UpdateSpec:
        """The names, shapes and dtypes of an update to this task."""
        profile = task.profile
        key = (profile.tier, profile.top_k, profile.rank, tuple(spec_of(task.payload).items()))
        if key not in self._known:
            self._known[key] = self._find(task)
        return self._known[key]

    def _find(self, task: Task) -> UpdateSpec:
        model = self._skeleton
        payload: Tensors = {name: value.to(model.device) for name, value in task.payload.items()}
        try:
            hooks = self._method.install(model, payload, task.profile, generator_for("spec"))
            size = torch.Size((len(model.layers), model.num_experts))
            return UpdateSpec(spec_of(model.adapter), spec_of(hooks.extras()), (size, torch.int64))
        finally:
            model.clear()


class Validator:
    """Validates the updates of one round.

    Args:
        specs: what an update looks like.
        settings: the run.
        method: the run's; it may check values of its own.
        wanted: how many updates the round is for.
    """

    def __init__(self, specs: UpdateSpecs, settings: RunSettings, method: Method, wanted: int) -> None:
        self._specs, self._settings, self._method = specs, settings, method
        self._quorum = max(min(1, wanted), math.ceil(settings.rounds.quorum * wanted - 1e-9))

    def fault(self, update: Update, task: Task | None, number: int) -> Dropped | None:
        """Why an update does not count in this round; None if it does. `task` is what its client was asked, if anything."""
        try:
            if task is None:
                raise Rejected("nothing was asked of this client, or it has answered already")
            self._check(update, task)
        except Rejected as reason:
            return Dropped(update.client, number, "validation", str(reason))
        except Exception as error:  # whatever it holds is its client's matter and not the round's
            why = f"cannot be validated: {type(error).__name__}: {printable(str(error))}"
            return Dropped(update.client, number, "validation", why)
        return None

    def _check(self, update: Update, task: Task) -> None:
        settings = self._settings
        check_update(
            update, task, self._specs(task), settings.rounds.max_change, self._experts_run(task),
            most_tokens(settings, task.profile.num_examples),
        )  # fmt: skip
        if fault := self._method.fault(update):
            raise Rejected(fault)

    def _experts_run(self, task: Task) -> list[int]:
        """How many experts per token a step of this client may run."""
        own, skipped = task.profile.top_k, self._method.skipped
        top_ks = range(min(1, own), own + 1) if self._settings.tiers.elastic_share > 0 else [own]
        return [skipped.runs(top_k) if skipped else top_k for top_k in top_ks]

    def check_quorum(self, count: int, number: int) -> None:
        """Raise RoundError if so few updates count that the round does not."""
        if count < self._quorum:
            raise RoundError(
                f"round {number}: {count} updates count, rounds.quorum asks for {self._quorum}; the checkpoint before "
                "it is intact. See the events for why clients were dropped, then start again to go on; where it was by "
                "chance, the same would be dropped again ([simulation], poisson sampling): lower rounds.quorum first"
            )
