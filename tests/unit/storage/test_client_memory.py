"""What clients keep: the newest of each, so many states, back to an earlier round, and never believed when damaged."""

from pathlib import Path

import pytest
import torch

from ubsmoe.errors import UserError
from ubsmoe.storage.client_memory import ClientMemory


def test_each_client_has_what_it_kept_last_and_goes_back(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path / "clients", 2)
    assert memory.recall("a") == {}
    memory.go_back(0)  # nothing there yet
    for round in (1, 2, 4):
        memory.keep("a", round, {"x": torch.full((2, 3), float(round))})
    memory.keep("b", 3, {"x": torch.zeros(1)})
    assert [path.name for path in sorted((tmp_path / "clients" / "a").iterdir())] == ["round-00002", "round-00004"]
    assert float(memory.recall("a")["x"][1, 2]) == 4 and memory.recall("b")["x"].shape == (1,)
    memory.go_back(2)
    assert float(memory.recall("a")["x"][0, 0]) == 2 and memory.recall("b") == {}
    memory.keep("a", 3, {"x": torch.ones(1)})
    assert float(memory.recall("a")["x"]) == 1


def test_what_is_damaged_is_named_and_no_older_one_taken(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 3)
    for round in (1, 2):
        memory.keep("a", round, {"x": torch.ones(5)})
    (tmp_path / "a" / "round-00002" / "state.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"round-00002.state\.safetensors is damaged"):
        memory.recall("a")
