"""bench/faults.py must fail when an outcome is not the declared one, or its green matrix means nothing."""

import sys
from pathlib import Path

import pytest

from ubsmoe.server import update_checks as checks

BENCH = Path(__file__).parents[2] / "bench"


def exit_code(monkeypatch: pytest.MonkeyPatch, families: str = "C") -> int:
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setattr(sys, "argv", ["faults.py", "--quick", "--only", families])
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


def test_a_family_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, "CX") == 2
    assert "there is no family X; there are A, B, C" in capsys.readouterr().err


def test_generated_replies_are_drops_and_the_good_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    import replies

    monkeypatch.setattr(replies, "LAYERS", 1)
    monkeypatch.setattr(replies, "EXPERTS", 4)
    found = replies.measured(40, seed=3)["outcomes"]
    assert set(found) == {"wire", "validation"} and sum(found.values()) == 40


def test_places_and_what_a_client_sends_of_every_kind_end_as_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from fault_cases import one_client, variants
    from fault_cases.round_of_five import Round

    world = Round()
    assert [row.fault for row in (*one_client.places(world), *variants.variants(world)) if not row.holds] == []
