"""bench/faults.py must fail when an outcome is not the declared one, or its green matrix means nothing."""

import sys
from pathlib import Path

import pytest

from ubsmoe.server import update_checks as checks

BENCH = Path(__file__).parents[2] / "bench"


def exit_code(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setattr(sys, "argv", ["faults.py", "--quick", "--only", "C"])
    import faults

    with pytest.raises(SystemExit) as ended:
        faults.main()
    return int(ended.value.code or 0)


def test_declared_outcomes_end_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(monkeypatch) == 0
    assert "12 of 12 faults, 12 as declared" in capsys.readouterr().out


def test_a_fault_that_is_counted_instead_of_dropped_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "check_numbers", lambda update, task: None)
    assert exit_code(monkeypatch) == 1
    assert "12 of 12 faults, 10 as declared" in capsys.readouterr().out
