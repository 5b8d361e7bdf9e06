"""How far a computation is, for whoever watches it: what is said last replaces what was said before.

Whatever can take seconds says so here. Without a watcher, as in a worker process, it costs nothing.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
Watcher = Callable[[str], None]

_watchers: list[Watcher] = []


def at(what: str, done: int = 0, total: int = 0) -> None:
    """Say what is being done, and how many of its parts are; the empty text says that nothing is to be shown."""
    if _watchers:
        _watchers[-1](f"{what} {done}/{total}" if total else what)


def through(items: Collection[T], what: str) -> Iterator[T]:
    """The items one by one, saying how many are done."""
    for i, item in enumerate(items):
        at(what, i, len(items))
        yield item


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside, this one is told; whoever watched before is told again afterwards."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def is_watching(watcher: Watcher) -> bool:
    """Whether this one is told now."""
    return bool(_watchers) and _watchers[-1] == watcher
