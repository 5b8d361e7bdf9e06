"""What clients keep for themselves between rounds, as checkpoints of their own: `clients/{client}/round-00003/`.

No server reads it. It lies in the run folder of a run in this process, so that a resumed run goes on as a whole one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ubsmoe.storage import disk
from ubsmoe.storage.checkpoints import load_checkpoint, save_checkpoint, saved_checkpoints

if TYPE_CHECKING:
    from torch import Tensor


class ClientMemory:
    """A folder with what each client keeps.

    Args:
        folder: where; created when a client first keeps something.
        keep: states of each client that stay: one more than the run has checkpoints to go back to.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def recall(self, client: str) -> "dict[str, Tensor]":
        """What a client kept last; nothing before its first round. Raises CheckpointError if it is damaged."""
        saved = saved_checkpoints(self._folder / client)
        return load_checkpoint(saved[-1]).tensors if saved else {}

    def keep(self, client: str, round: int, tensors: "Mapping[str, Tensor]") -> None:
        """Save what a client keeps after a round; durable when this returns. Raises CheckpointError as `save_checkpoint`."""
        save_checkpoint(self._folder / client, round, tensors, {}, self._keep)

    def go_back(self, round: int) -> None:
        """Forget what was kept after later rounds, which the run will do again."""
        for client in self._folder.glob("*"):
            for path in saved_checkpoints(client):
                if int(path.name.partition("-")[2]) > round:
                    disk.remove_folder(path)
