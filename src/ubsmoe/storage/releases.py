"""releases.jsonl of a private run: each attempt at a round, before anybody is asked, and each model that left the server.

A round that is run again, after a crash or from an older checkpoint, must not draw the noise that it drew before: the difference of
the two models would be the clients' changes, bare. So every attempt has a salt of its own, which is never written: of it the file
holds the hash. Epsilon counts the models that went out, those of repeated rounds too. Only the owner can read the file.
"""

import hashlib
import secrets
from pathlib import Path

from ubsmoe.errors import UserError
from ubsmoe.storage.events import EventLog, read_events

ATTEMPT, RELEASED = "attempt", "released"


class ReleaseError(UserError):
    """Nobody can tell any more how many models of a private run went out."""


class Releases:
    """The file, opened by the one process that runs.

    Args:
        path: the file; created when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._log = path, EventLog(path, mode=0o600)
        self._rounds = [event["round"] for event in read_events(path) if event["event"] == RELEASED]

    @property
    def count(self) -> int:
        """How many models went out."""
        return len(self._rounds)

    def check(self, done: int) -> None:
        """Raise ReleaseError unless the model of every round up to `done` is in the file."""
        if missing := sorted(set(range(1, done + 1)) - set(self._rounds)):
            raise ReleaseError(
                f"{self._path} has no entry of round {missing[0]}, but the newest checkpoint is of round {done}: how much privacy "
                "was spent cannot be said; put the file back, or start anew with another --out"
            )

    def begin(self, round: int) -> str:
        """The salt of a new attempt at a round, which is durably noted: 256 secret bits."""
        salt = secrets.token_hex(32)
        self._note(ATTEMPT, round, salt_sha256=hashlib.sha256(salt.encode()).hexdigest())
        return salt

    def release(self, round: int) -> int:
        """Note durably that the round's model goes out now. Gives how many have gone out with it."""
        self._note(RELEASED, round)
        self._rounds.append(round)
        return self.count

    def close(self) -> None:
        """Give the file back; closing twice is fine."""
        self._log.close()

    def _note(self, event: str, round: int, **fields: str) -> None:
        self._log.append(event, round, **fields)
        self._log.sync()
