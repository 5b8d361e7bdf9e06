"""A Grid in this process: every node's ClientApp is called when its answer is asked for. Faults are put in by node."""

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity  # a Message asks it who writes; Flower's own processes set it

SERVER = 1
Fault = Callable[[Message, Callable[[], Message]], list[Message]]


class LoopGrid(Grid):
    """`nodes` are node configurations by node id, `names` what their keys are registered as.

    A fault gets a message and its honest answer, and gives the answers.
    """

    def __init__(self, app: ClientApp, nodes: dict[int, dict[str, Any]], run_config: dict[str, Any]) -> None:
        self.nodes, self.faults, self.asked = dict(nodes), {}, []  # type: ignore[var-annotated]
        self.names: dict[int, str] = {}
        self.faulty = "train"  # the kind of message to which faults apply
        self._app, self._run_config, self._messages = app, run_config, {}  # type: ignore[var-annotated]
        self._written = 0
        self._states: dict[int, RecordDict] = {}  # what Flower keeps for a node between messages

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *_: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, name=self.names.get(node, "")) for node in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:  # type: ignore[override]
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [answer for key in message_ids if key in self._messages for answer in self._answers(key)]

    def _push(self, message: Message) -> str | None:
        if message.metadata.dst_node_id not in self.nodes:
            return None
        self._written += 1
        key = f"message-{self._written}"
        message.metadata.__dict__["_message_id"] = key
        self._messages[key] = message
        self.asked.append((message.metadata.dst_node_id, message.metadata.message_type))
        return key

    def _answers(self, key: str) -> list[Message]:
        message = self._messages.pop(key)
        node = message.metadata.dst_node_id
        state = self._states.setdefault(node, RecordDict())
        context = Context(0, node, self.nodes.get(node, {}), state, self._run_config)
        fault = self.faults.get(node)
        if fault is None or not message.metadata.message_type.startswith(self.faulty):
            return [self._app(message, context)]
        answers = fault(message, lambda: self._app(message, context))
        if not answers:
            self._messages[key] = message  # still at it
        return answers


def as_process() -> None:
    """What Flower sets before an app's code runs."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SERVER
