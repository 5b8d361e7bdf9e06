"""events.jsonl: what happened in a run, one JSON object per line, in the order in which it happened."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from ubsmoe.errors import UserError
from ubsmoe.storage import disk
from ubsmoe.storage.json_text import decode_json, encode_json

Event = dict[str, Any]
DAMAGED = (
    "the file is damaged. Remove that line, or move the file away, and start the run again with the same --out: "
    "it goes on from its newest checkpoint, and reports lack what was lost"
)


class EventError(UserError):
    """An event file that cannot be read; the message names the line."""


def utc_now() -> datetime:
    """The time put on events; tests pass a clock of their own."""
    return datetime.now(UTC)


class EventLog:
    """Appends events to a file.

    A line is handed to the system before `append` returns, so that a killed process loses none; `sync` makes them
    outlive a power cut too. A last line that a crash tore is cut off on opening.

    Args:
        path: the file; created when missing.
        clock: gives the time of each event.
        mode: who may read it, less what the umask takes.

    Raises:
        OSError: if the file cannot be opened or mended.
    """

    def __init__(self, path: str | Path, clock: Callable[[], datetime] = utc_now, mode: int = 0o666) -> None:
        self.path = Path(path)
        self._clock = clock
        self._file = disk.AppendFile(self.path, mode)
        self._file.cut(disk.read_file(self.path).rfind(b"\n") + 1)

    def append(self, event: str, round: int | None = None, **fields: Any) -> None:
        """Write one event.

        Args:
            event: what happened, such as "round_done".
            round: the round it belongs to; None for what belongs to the run as a whole.
            fields: anything else JSON can hold; NaN and infinities are written as text.

        Raises:
            OSError: if the disk refuses; the file then ends with the event before.
            TypeError: if a field is not JSON.
        """
        if "time" in fields:
            raise TypeError("the time of an event is set by the log's clock; name the field otherwise, such as seconds")
        line = {"event": event, "time": self._clock().isoformat(), "round": round, **fields}
        self._file.append(encode_json(line, sort_keys=False) + b"\n")

    def truncate_after(self, round: int) -> None:
        """Forget the first event of a later round and all that follows it, because those rounds will be run again.

        Args:
            round: the last round to keep; -1 keeps only what came before any round.

        Raises:
            EventError: if the file is damaged.
        """
        end = 0
        for line in disk.read_file(self.path).splitlines(keepends=True):
            of_line = _parse(line, f"{self.path} near byte {end}")["round"]
            if of_line is not None and of_line > round:
                break
            end += len(line)
        self._file.cut(end)

    def sync(self) -> None:
        """Make the events written so far outlive a power cut."""
        self._file.sync()

    def close(self) -> None:
        """Give the file back; closing twice is fine."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_events(path: str | Path) -> list[Event]:
    """All events of a file, in its order.

    A run that was killed while writing may leave a torn last line; it is returned as an event of its own, named
    "torn_line", with its size in `bytes`. Nothing is skipped.

    Raises:
        EventError: if a whole line is not an event; the message names file and line.
    """
    *lines, tail = disk.read_file(path).split(b"\n")
    events = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    if tail:
        events.append({"event": "torn_line", "time": None, "round": None, "bytes": len(tail)})
    return events


class EventTail:
    """Reads a file that another process goes on writing: each look costs what was written since the one before.

    Args:
        path: the file; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._end, self._last = 0, b""  # how far it was read, and the last line up to there

    def new(self) -> list[Event]:
        """The whole lines that were added since.

        A resumed run has cut off the events after its checkpoint; what it wrote then is told from what stayed by its time.

        Raises:
            EventError: if a whole line is not an event; the message names it.
        """
        if not self._path.exists():
            return []
        disk.check_plain(self._path)
        with open(self._path, "rb") as file:
            file.seek(self._end - len(self._last))
            begin = self._end if file.read(len(self._last)) == self._last else 0
            file.seek(begin)
            data = file.read()
        events = [_parse(line, f"{self._path} after byte {begin}") for line in data.split(b"\n")[:-1]]
        if begin < self._end:
            shown_until = _parse(self._last, str(self._path))["time"]
            events = [event for event in events if event["time"] > shown_until]
        if whole := data[: data.rfind(b"\n") + 1]:
            self._end, self._last = begin + len(whole), whole[whole[:-1].rfind(b"\n") + 1 :]
        return events


def _parse(line: bytes, where: str) -> Event:
    try:
        event = decode_json(line)
    except (ValueError, RecursionError) as error:
        raise EventError(f"{where}: not JSON ({error}); {DAMAGED}") from None
    if not (
        isinstance(event, dict)
        and isinstance(event.get("event"), str)
        and isinstance(event.get("time"), str)
        and isinstance(event.get("round", ""), int | None)
    ):
        raise EventError(f"{where}: not an event, which is an object with event, time and round; {DAMAGED}")
    return event
