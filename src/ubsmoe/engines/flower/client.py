"""The app that every node runs.

Flower starts a process for every message, so this imports neither torch nor the model: it hands the bytes to the resident
process, or answers them itself if there is none.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Error, Message
from flwr.clientapp import ClientApp

from ubsmoe.client.node_config import ANY, PLUG_INS, SECURE_STEPS, UNSIGNED, NodeConfig, on_this_machine
from ubsmoe.client.node_config import TRAIN as SECURE_TRAIN
from ubsmoe.config import RunSettings
from ubsmoe.engines.flower import resident
from ubsmoe.engines.flower.app import read_app
from ubsmoe.engines.flower.record import from_record, to_record
from ubsmoe.errors import UserError
from ubsmoe.wire.packed import Packed, WireError, disclose, enclose

if TYPE_CHECKING:
    from ubsmoe.client.node import Machine

RESIDENT_SECONDS = "resident-seconds"  # node configuration: how long an idle resident stays; without it there is none


def client_app(run_file: Path) -> ClientApp:
    """The app of a run file."""
    app = ClientApp()
    app.query("announce")(_handler("announce", run_file))
    app.train()(_handler("train", run_file))
    for kind in SECURE_STEPS:
        register = app.train if kind == SECURE_TRAIN else app.query
        register(kind)(_handler(kind, run_file))
    return app


def _handler(kind: str, run_file: Path) -> Callable[[Message, Context], Message]:
    def handle(message: Message, context: Context) -> Message:
        """Answer a user's mistake or a failed training with an error; Flower reports a bug."""
        try:
            return Message(to_record(_answer(kind, run_file, message, context)), reply_to=message)
        except (UserError, WireError) as error:
            return Message(Error(0, str(error)), reply_to=message)

    return handle


def _answer(kind: str, run_file: Path, message: Message, context: Context) -> Packed:
    config = dict(context.node_config)
    seconds = float(config.pop(RESIDENT_SECONDS, 0))
    if "ray" in sys.modules:  # simulated nodes, on the machine of the run file
        config[PLUG_INS] = ANY
    settings, identity = on_this_machine(read_app(run_file, context.run_config), config)
    packed = from_record(message.content)
    if kind in SECURE_STEPS:
        return _answer_secure(kind, settings, identity, packed, context, seconds)
    return _answer_with(kind, settings, identity, packed, seconds)


def _answer_secure(
    kind: str, settings: RunSettings, identity: NodeConfig, packed: Packed, context: Context, seconds: float
) -> Packed:
    """A message of a secure round. What a client remembers of it lies in Flower's state, since its processes come and go."""
    _, (client,) = disclose(packed, "client")
    place = f"secure.{client}"
    kept = context.state.config_records.get(place, ConfigRecord())
    inner, _ = disclose(packed)
    asked = enclose(inner, client=client, memory=str(kept.get("memory", "")))
    if "ray" in sys.modules:  # simulated nodes, which have no keys and share a process
        identity = {UNSIGNED: True, **identity}
    answer, (memory,) = disclose(_answer_with(kind, settings, identity, asked, seconds), "memory")
    context.state[place] = ConfigRecord({"memory": memory})
    return answer


def _answer_with(kind: str, settings: RunSettings, identity: NodeConfig, packed: Packed, seconds: float) -> Packed:
    """The answer of the resident, or of this process if there is none."""
    if seconds > 0:
        try:
            return resident.ask(kind, settings, identity, packed, seconds)
        except resident.Unavailable as error:
            logging.getLogger("ubsmoe").warning("no resident process (%s): this one loads the base itself", error)
    return _machine(settings).node(identity).answer(kind, packed)


_machines: "list[Machine]" = []
"""At most one: simulated nodes take turns in one process and share it."""


def _machine(settings: RunSettings) -> "Machine":
    if not _machines or _machines[0].settings != settings:
        from ubsmoe.client.node import Machine

        _machines[:] = [Machine(settings)]
    return _machines[0]
