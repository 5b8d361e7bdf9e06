"""The messages of a secure round over a Grid: pushed one by one, and awaited in order."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ubsmoe.messages import Dropped
from ubsmoe.wire.packed import Packed

Answer = Packed | Dropped


def carried(
    messages: Iterable[tuple[str, Packed]],
    round: int,
    node_of: Callable[[str], int | None],
    push: Callable[[str, Packed], str | None],
    pull: Callable[[list[str], dict[str, Any]], list[tuple[Any, Any]]],
    read: Callable[[Any, str], Answer],
    limit: tuple[float, str],
    clock: Callable[[], float],
    poll_seconds: float,
) -> Iterator[tuple[str, Answer]]:
    """Each client's answer, in the order of the messages.

    Args:
        messages: by client.
        round: the number that a lost client's event has.
        node_of: where a client is. A node has one message at a time, since Flower keeps one state for it, the last to be written.
        push: sends a client its message; gives the message's id, or None if Flower did not take it.
        pull: gives the answers that are there, each with its client, and takes them off the given ids.
        read: what a client's answer holds.
        limit: seconds after which a client is lost, and how that is said.
        clock: seconds.
        poll_seconds: between two looks.
    """
    seconds, said = limit
    asked, waiting, came, began = list[str](), dict[str, Any](), dict[str, Answer](), dict[str, float]()

    def wait_for(client: str) -> None:
        while client not in came:
            late = clock() - began[client] > seconds
            found = pull([message_id for message_id, other in waiting.items() if late or other == client], waiting)
            came.update({other: read(message, other) for message, other in found})
            if late and client not in came:
                came[client] = Dropped(client, round, "deadline", f"no answer within {said}")
            elif not found:
                time.sleep(poll_seconds)

    for client, packed in messages:
        for other in asked:
            if node_of(other) == node_of(client):
                wait_for(other)
        asked.append(client)
        began[client] = clock()
        message_id = push(client, packed)
        if message_id is None:
            came[client] = Dropped(client, round, "wire", "Flower did not take the message")
        else:
            waiting[message_id] = client
    for client in asked:
        wait_for(client)
        yield client, came.pop(client)
