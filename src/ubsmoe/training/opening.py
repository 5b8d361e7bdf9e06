"""What a run needs is loaded, and its folder opened for writing: how every run in this process is carried out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.config import RunSettings, to_json
from ubsmoe.engines.local import LocalEngine, Progress, check_workers, process_pool, score_in
from ubsmoe.engines.simulated import as_simulated
from ubsmoe.errors import UserError
from ubsmoe.plan.tiers import run_costs
from ubsmoe.server.federation import Federation, build_federation
from ubsmoe.server.origin import made_with
from ubsmoe.server.run import Report, Run
from ubsmoe.storage.client_memory import ClientMemory
from ubsmoe.storage.copies import placed_files
from ubsmoe.storage.layout import CLIENTS
from ubsmoe.storage.record import TierCosts
from ubsmoe.storage.runfolder import RunFolder


def load(settings: RunSettings, place: Path, files: Mapping[Path, bytes], workers: int) -> Federation:
    """The base, the method and the clients with their data.

    Args:
        settings: the run.
        place: its folder.
        files: the records that lie there, which are written first.
        workers: processes that will train.

    Raises:
        UserError: for any setting that cannot be met.
    """
    check_workers(workers, settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    # one state more than there are checkpoints: a round may be under way
    memory = ClientMemory(place / CLIENTS, settings.keep_checkpoints + 1)
    with placed_files(place, files):
        federation = replace(build_federation(settings), memory=memory)
    keep_freed_memory()  # not before: what loading frees goes back to the system
    return federation


@contextmanager
def opened(
    federation: Federation, place: Path, workers: int, report: Report, progress: Progress | None
) -> Iterator[Run]:
    """The run with its folder open and its processes started: begun, or gone back to its newest checkpoint.

    Raises:
        RunFolderError: if the folder holds anything else, or is in use.
    """
    settings = federation.settings
    with (
        process_pool(federation, workers) as pool,
        RunFolder.open_or_create(place, to_json(settings), made_with(settings)) as folder,
    ):
        if costs := known_costs(settings, lambda reason: report("note", 0, {"reason": reason})):
            folder.write_costs(costs)
        patience = settings.rounds.give_up_seconds
        clients = LocalEngine(federation.trainer, federation.examples, federation.clients, progress, pool, patience)
        score_all = partial(score_in, pool) if pool else None
        yield Run(federation, folder, as_simulated(clients, federation), report, score_all)


def known_costs(settings: RunSettings, say: Callable[[str], object] = lambda _: None) -> list[TierCosts] | None:
    """What each tier costs; None for a base whose sizes are not known, which can be trained all the same.

    `say` gets the reason.
    """
    try:
        return cast(list[TierCosts], [cost.as_dict() for cost in run_costs(settings)])
    except UserError as error:
        say(str(error))
        return None
