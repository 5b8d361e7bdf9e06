"""The app that every node runs.

Flower starts a process for every message, so this imports neither torch nor the model: it hands the bytes to the resident
worker, or, without one, works them off itself.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from ubsmoe.engines.flower import resident as worker
from ubsmoe.engines.flower.app import read_app
from ubsmoe.engines.flower.record import from_record, to_record
from ubsmoe.errors import UserError
from ubsmoe.wire.packed import Packed, WireError

RESIDENT_SECONDS = "resident-seconds"  # node configuration: how long an idle worker stays; without it there is none


def client_app(run_file: Path) -> ClientApp:
    """The app of a run file."""
    app = ClientApp()
    app.query("announce")(_handler("announce", run_file))
    app.train()(_handler("train", run_file))
    return app


def _handler(kind: str, run_file: Path) -> Callable[[Message, Context], Message]:
    def handle(message: Message, context: Context) -> Message:
        """A user's mistake or a failed training is an answer too; a bug is Flower's to report."""
        try:
            return Message(to_record(_work(kind, run_file, message, context)), reply_to=message)
        except (UserError, WireError) as error:
            return Message(Error(0, str(error)), reply_to=message)

    return handle


def _work(kind: str, run_file: Path, message: Message, context: Context) -> Packed:
    settings, config = read_app(run_file, context.run_config), dict(context.node_config)
    seconds = float(config.pop(RESIDENT_SECONDS, 0))
    packed = from_record(message.content)
    if seconds > 0:
        try:
            return worker.ask(kind, settings, config, packed, seconds)
        except worker.Unavailable as error:
            logging.getLogger("ubsmoe").warning("no worker (%s): this process loads the base itself", error)
    from ubsmoe.client.node import node_of

    return node_of(settings, config).answer(kind, packed)
