import json
import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ubsmoe.storage.events import EventError, EventLog, EventTail, read_events

NOON = datetime(2025, 1, 2, 12, 0, tzinfo=UTC)
NUMBERS_AS_TEXT = ("NaN", "Infinity", "-Infinity")  # what `decode_json` makes numbers again
plain_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 2**63, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text().filter(lambda text: text not in NUMBERS_AS_TEXT),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=3),
    max_leaves=8,
)


def log_of(path, *rounds):
    with EventLog(path, clock=lambda: NOON) as log:
        for round in rounds:
            log.append("step", round)


def rounds_in(path):
    return [event["round"] for event in read_events(path)]


def test_one_event_is_one_line_with_time_and_round(tmp_path):
    with EventLog(tmp_path / "e.jsonl", clock=lambda: NOON) as log:
        log.append("round_done", 3, loss=0.5)
    line = '{"event": "round_done", "time": "2025-01-02T12:00:00+00:00", "round": 3, "loss": 0.5}\n'
    assert (tmp_path / "e.jsonl").read_text() == line


def test_time_is_utc_when_no_clock_is_given(tmp_path):
    with EventLog(tmp_path / "e.jsonl") as log:
        log.append("start")
    assert datetime.fromisoformat(read_events(tmp_path / "e.jsonl")[0]["time"]).utcoffset() == timedelta(0)


names = st.text().filter(lambda name: name not in ("event", "time", "round", "self"))


@settings(max_examples=60)
@given(fields=st.dictionaries(names, plain_json, max_size=4))
def test_any_json_field_comes_back_equal(tmp_path_factory, fields):
    path = tmp_path_factory.mktemp("events") / "e.jsonl"
    with EventLog(path, clock=lambda: NOON) as log:
        log.append("x", None, **fields)
        log.append("y", 1)
    first, second = read_events(path)
    assert first == {"event": "x", "time": NOON.isoformat(), "round": None, **fields}
    assert second["event"] == "y"


def test_numbers_that_json_lacks_are_written_as_text(tmp_path):
    with EventLog(tmp_path / "e.jsonl") as log:
        log.append("loss", values=[float("nan"), float("-inf")])
    assert '["NaN","-Infinity"]' in (tmp_path / "e.jsonl").read_text().replace(" ", "")
    nan, low = read_events(tmp_path / "e.jsonl")[0]["values"]
    assert math.isnan(nan) and low == -math.inf


def test_a_field_that_is_not_json_is_refused_and_nothing_is_written(tmp_path):
    with EventLog(tmp_path / "e.jsonl") as log:
        with pytest.raises(TypeError, match="JSON"):
            log.append("x", value={1, 2})
        with pytest.raises(TypeError, match="clock"):
            log.append("x", time=3)
    assert (tmp_path / "e.jsonl").read_bytes() == b""


@pytest.mark.parametrize("cut", range(1, 71))
def test_a_torn_last_line_is_cut_off_on_opening(tmp_path, cut):
    path = tmp_path / "e.jsonl"
    log_of(path, 1, 2)
    whole = path.read_bytes()
    line = len(whole) // 2
    path.write_bytes(whole[: line + min(cut, line - 1)])
    log_of(path, 9)
    assert rounds_in(path) == [1, 9]


def test_opening_a_sound_file_changes_nothing(tmp_path):
    log_of(tmp_path / "e.jsonl", 1, 2)
    before = (tmp_path / "e.jsonl").read_bytes()
    log_of(tmp_path / "e.jsonl")
    assert (tmp_path / "e.jsonl").read_bytes() == before


def test_a_reader_is_told_of_a_torn_line(tmp_path):
    path = tmp_path / "e.jsonl"
    log_of(path, 1)
    path.write_bytes(path.read_bytes() + b'{"event": "st')
    assert read_events(path)[1:] == [{"event": "torn_line", "time": None, "round": None, "bytes": 13}]


@pytest.mark.parametrize(
    "line", [b"{not json", b"[1]", b"", b'{"event": "x", "round": 1}', b"\xff\xfe", b"[" * 200_000, b'{"round": "2"}']
)
def test_a_damaged_line_is_named_not_skipped(tmp_path, line):
    path = tmp_path / "e.jsonl"
    log_of(path, 1)
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    with pytest.raises(EventError, match="line 2"):
        read_events(path)
    with EventLog(path) as log, pytest.raises(EventError, match="near byte"):
        log.truncate_after(1)


@settings(max_examples=60)
@given(
    rounds=st.lists(st.none() | st.integers(0, 5), max_size=12),
    last=st.integers(-1, 5),
)
def test_after_truncation_no_later_round_remains_and_the_rest_is_a_prefix(tmp_path_factory, rounds, last):
    path = tmp_path_factory.mktemp("events") / "e.jsonl"
    log_of(path, *rounds)
    with EventLog(path) as log:
        log.truncate_after(last)
        log.append("again", last + 1)
    *kept, again = rounds_in(path)
    assert again == last + 1
    assert kept == rounds[: len(kept)]
    assert all(round is None or round <= last for round in kept)
    assert len(kept) == len(rounds) or rounds[len(kept)] > last


def test_lines_are_in_the_file_before_append_returns(tmp_path):
    log = EventLog(tmp_path / "e.jsonl")
    log.append("one")
    assert json.loads((tmp_path / "e.jsonl").read_text())["event"] == "one"
    log.close()
    log.close()


def ticking():
    """A clock that goes on by a second at each look."""
    seconds = iter(range(10**6))
    return lambda: NOON + timedelta(seconds=next(seconds))


def seen(tail):
    return [event["round"] for event in tail.new()]


def test_a_tail_gives_each_event_once_and_a_torn_line_only_when_it_is_whole(tmp_path):
    path = tmp_path / "e.jsonl"
    tail = EventTail(path)
    assert seen(tail) == []
    with EventLog(path, ticking()) as log:
        for round in (1, 2):
            log.append("step", round)
        assert (seen(tail), seen(tail)) == ([1, 2], [])
        log.append("step", 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert seen(tail) == []
    path.write_bytes(whole)
    assert (seen(tail), seen(tail)) == ([3], [])


@pytest.mark.parametrize("look_after_the_cut", [True, False])
def test_a_tail_follows_a_run_that_went_back_and_repeats_nothing(tmp_path, look_after_the_cut):
    path = tmp_path / "e.jsonl"
    tail = EventTail(path)
    with EventLog(path, ticking()) as log:
        for round in (1, 2, 3, 4):
            log.append("step", round)
        assert seen(tail) == [1, 2, 3, 4]
        log.truncate_after(1)
        if look_after_the_cut:
            assert seen(tail) == []
        for round in (1, 2, 3, 4, 5):
            log.append("again", round)
        assert (seen(tail), seen(tail)) == ([1, 2, 3, 4, 5], [])


def test_a_look_at_a_long_run_reads_only_what_is_new(tmp_path, monkeypatch):
    path = tmp_path / "e.jsonl"
    with EventLog(path, ticking()) as log:
        for round in range(3000):
            log.append("step", round, utilization=[0.5] * 8)
        tail = EventTail(path)
        assert len(tail.new()) == 3000
        log.append("step", 3000)
        parsed = []
        monkeypatch.setattr("ubsmoe.storage.events._parse", lambda line, where: parsed.append(line) or json.loads(line))
        assert seen(tail) == [3000] and len(parsed) == 1
