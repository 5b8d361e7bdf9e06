import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ubsmoe
from ubsmoe.storage.checkpoints import CheckpointError, file_sha256
from ubsmoe.storage.events import read_events
from ubsmoe.storage.runfolder import (
    RunFolder,
    RunFolderError,
    atomic_write,
    read_adapter,
    read_run,
    read_states,
)
from ubsmoe.storage.same_run import differing_settings
from ubsmoe.storage.versions import current_versions

CONFIG = json.dumps({"seed": 0, "train": {"rounds": 5, "learning_rate": 0.002}, "tiers": {"budgets": [0.25, 1.0]}})
VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def other(**changes):
    table = json.loads(CONFIG)
    return json.dumps(table | changes)


def test_a_new_folder_holds_settings_versions_and_places_for_the_rest(tmp_path):
    with RunFolder.open_or_create(tmp_path / "out" / "run", CONFIG, VERSIONS):
        pass
    record = read_run(tmp_path / "out" / "run")
    assert (record.config, record.versions, record.events, record.summary) == (json.loads(CONFIG), VERSIONS, [], None)
    assert {path.name for path in record.path.iterdir()} == {
        *("config.json", "versions.json", "events.jsonl", "checkpoints", ".lock")
    }


def test_versions_are_those_of_this_machine():
    versions = current_versions()
    assert list(versions)[:5] == ["ubsmoe", "python", "platform", "torch", "transformers"]
    assert set(versions) - set(list(versions)[:5]) <= {"commit"}
    in_checkout = (Path(ubsmoe.__file__).parents[2] / ".git").exists()
    assert bool(re.fullmatch(r"[0-9a-f]{40}\+?", versions.get("commit", ""))) == in_checkout
    assert versions["ubsmoe"] == ubsmoe.__version__
    assert versions["torch"] == torch.__version__


def test_the_same_settings_open_the_run_again(tmp_path):
    RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS).close()
    shuffled = json.dumps(dict(reversed(json.loads(CONFIG).items())))
    RunFolder.open_or_create(tmp_path, shuffled, VERSIONS).close()


@pytest.mark.parametrize("read", [read_run, read_adapter, read_states])
def test_a_folder_of_an_older_ubsmoe_is_refused_in_one_sentence(tmp_path, read):
    finish(tmp_path)
    (tmp_path / "versions.json").write_text(json.dumps({"ubsmoe": "0.1.0"}))
    sentence = f"{tmp_path} was written by ubsmoe 0.1.0; ubsmoe 0.2 does not read it: use 0.1.0 or run it again"
    with pytest.raises(RunFolderError, match=f"^{re.escape(sentence)}$"):
        read(tmp_path)
    with pytest.raises(RunFolderError, match=f"^{re.escape(sentence)}$"):
        RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS)


def test_reading_a_run_imports_no_torch(tmp_path):
    finish(tmp_path)
    program = "import sys; from ubsmoe.storage.runfolder import read_run; read_run(sys.argv[1])"
    program += "; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def begun(path, config):
    """A run with something to lose."""
    with RunFolder.open_or_create(path, config, VERSIONS) as folder:
        folder.save_checkpoint(0, {"total": torch.zeros(())}, {}, keep=2)


def test_a_start_with_nothing_saved_begins_again_with_other_settings(tmp_path):
    RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS).close()
    RunFolder.open_or_create(tmp_path, other(seed=3), VERSIONS).close()
    assert read_run(tmp_path).config["seed"] == 3


def test_a_run_goes_on_with_another_quorum(tmp_path):
    begun(tmp_path, other(rounds={"quorum": 0.5}))
    RunFolder.open_or_create(tmp_path, other(rounds={"quorum": 0.25}), VERSIONS).close()
    assert read_run(tmp_path).config["rounds"]["quorum"] == 0.25
    with pytest.raises(RunFolderError, match=r"seed .there 0, asked 1"):
        RunFolder.open_or_create(tmp_path, other(rounds={"quorum": 0.1}, seed=1), VERSIONS)


def test_other_settings_are_named_by_dotted_key_and_the_folder_stays_as_it_is(tmp_path):
    begun(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(RunFolderError) as caught:
        RunFolder.open_or_create(tmp_path, other(train={"rounds": 9, "learning_rate": 0.003}, seed=1), VERSIONS)
    assert "seed (there 0, asked 1), train.learning_rate (there 0.002, asked 0.003); choose another --out" in str(
        caught.value
    )
    assert (tmp_path / "config.json").read_bytes() == before


def test_only_the_first_five_differences_are_named(tmp_path):
    begun(tmp_path, "{}")
    with pytest.raises(RunFolderError, match=r"e .there None, asked 4. and 2 more;"):
        RunFolder.open_or_create(tmp_path, json.dumps(dict(zip("abcdefg", range(7), strict=True))), VERSIONS)


settings = st.recursive(
    st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
    lambda part: st.dictionaries(st.text("abc", min_size=1, max_size=2), part, min_size=1, max_size=3),
    max_leaves=6,
).filter(lambda value: isinstance(value, dict))


@hypothesis.settings(max_examples=60)
@given(first=settings, second=settings)
def test_settings_differ_exactly_when_the_tables_do(first, second):
    assert differing_settings(first, first) == {}
    assert bool(differing_settings(first, second)) == (first != second)
    assert {key: pair[::-1] for key, pair in differing_settings(first, second).items()} == differing_settings(
        second, first
    )


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match=r"not a run folder: it holds thesis\.tex; choose another --out"):
        RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS)
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.open_or_create(tmp_path / "thesis.tex", CONFIG, VERSIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_that_was_killed_before_config_was_written_is_begun_again(tmp_path):
    RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS).close()
    (tmp_path / "config.json").rename(tmp_path / ".config.json.draft")
    RunFolder.open_or_create(tmp_path, other(seed=3), VERSIONS).close()
    assert read_run(tmp_path).config["seed"] == 3


@pytest.mark.parametrize("data", [b"{", b"[1]", b"\xff"])
def test_damaged_settings_are_refused(tmp_path, data):
    RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS).close()
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(RunFolderError, match=r"config\.json"):
        RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS)


def test_reading_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(RunFolderError, match=r"is .* a run folder"):
        read_run(tmp_path)


def test_two_writers_on_one_folder_are_refused_until_the_first_lets_go(tmp_path):
    first = RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS)
    with pytest.raises(RunFolderError, match=rf"in use by another process \(pid {os.getpid()}\); stop it or choose"):
        RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS)
    assert read_run(tmp_path).versions == VERSIONS
    first.close()
    first.close()
    RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS).close()


def test_a_refused_open_lets_go_of_the_lock(tmp_path):
    begun(tmp_path, CONFIG)
    with pytest.raises(RunFolderError):
        RunFolder.open_or_create(tmp_path, other(seed=9), VERSIONS)
    RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS).close()


def test_a_killed_process_leaves_no_lock(tmp_path):
    program = (
        "import sys, time; from ubsmoe.storage.disk import Lock\n"
        "lock = Lock(sys.argv[1]); print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / ".lock")]
    env = {"PYTHONPATH": str(Path(ubsmoe.__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RunFolderError, match=f"pid {process.pid}"):
            RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS)
        process.send_signal(signal.SIGKILL)
        process.wait()
        RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS).close()


def run_rounds(folder, first, last, total=0.0):
    for round in range(first, last + 1):
        total += round / 7
        folder.events.append("round_done", round, total=total)
        folder.save_checkpoint(round, {"total": torch.tensor(total, dtype=torch.float64)}, {"total": total}, keep=2)
    return total


def test_a_resumed_run_has_the_events_and_state_of_one_that_never_stopped(tmp_path):
    with RunFolder.open_or_create(tmp_path / "whole", CONFIG, VERSIONS) as folder:
        assert folder.resume() is None
        expected = run_rounds(folder, 0, 4)
    with RunFolder.open_or_create(tmp_path / "broken", CONFIG, VERSIONS) as folder:
        run_rounds(folder, 0, 2)
        folder.events.append("round_done", 3, total=-1)
    with RunFolder.open_or_create(tmp_path / "broken", CONFIG, VERSIONS) as folder:
        checkpoint = folder.resume()
        assert checkpoint.round == 2
        assert run_rounds(folder, 3, 4, checkpoint.facts["total"]) == expected

    def told(name):
        return [(e["round"], e["total"]) for e in read_run(tmp_path / name).events if e["event"] == "round_done"]

    assert told("broken") == told("whole")


def test_resuming_tells_what_was_skipped_and_which_versions_changed(tmp_path):
    with RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS) as folder:
        run_rounds(folder, 1, 2)
    (tmp_path / "checkpoints/round-00002/facts.json").write_text("{}")
    with RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS | {"torch": "2.14.0"}) as folder:
        assert folder.resume().round == 1
    event = read_events(tmp_path / "events.jsonl")[-1]
    assert (event["event"], event["round"]) == ("resumed", 1)
    assert event["versions_changed"] == {"torch": ["2.13.0", "2.14.0"]}
    assert "facts.json is damaged" in event["skipped"][0]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path):
    with RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS) as folder:
        run_rounds(folder, 1, 1)
        (tmp_path / "checkpoints/round-00001/facts.json").unlink()
        with pytest.raises(CheckpointError, match="start anew"):
            folder.resume()
        assert len(read_events(tmp_path / "events.jsonl")) == 1


def finish(path):
    with RunFolder.open_or_create(path, CONFIG, VERSIONS) as folder:
        sha256 = folder.write_adapter({"B": torch.ones(3, 2), "A": torch.zeros(2, 5)}, {"rank": 2, "alpha": 16.0})
        folder.write_summary({"accuracy": 0.75, "loss": float("nan"), "adapter_sha256": sha256})
    return sha256


def test_the_result_is_an_adapter_with_its_hash_and_a_summary(tmp_path):
    assert finish(tmp_path) == file_sha256(tmp_path / "adapter.safetensors")
    adapter, facts = read_adapter(tmp_path)
    assert list(adapter) == ["A", "B"]
    assert torch.equal(adapter["B"], torch.ones(3, 2))
    assert facts == {"rank": 2, "alpha": 16.0}
    summary = read_run(tmp_path).summary
    assert summary["accuracy"] == 0.75 and math.isnan(summary["loss"])


def test_the_adapter_of_a_run_that_has_not_ended_is_not_read(tmp_path):
    with RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS) as folder:
        folder.write_adapter({"A": torch.ones(1)})
    with pytest.raises(RunFolderError, match="has not ended; start it with the same --out"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("without_hash", [False, True])
@pytest.mark.parametrize("data", [b"", b"\x80\x04K\x01.", b"\xff" * 64])
def test_a_damaged_adapter_is_refused(tmp_path, data, without_hash):
    finish(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(data)
    if without_hash:
        (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"adapter\.safetensors is damaged: .*(SHA-256|safetensors file)"):
        read_adapter(tmp_path)


def test_a_flipped_bit_in_a_weight_of_the_adapter_is_refused(tmp_path):
    finish(tmp_path)
    data = bytearray((tmp_path / "adapter.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "adapter.safetensors").write_bytes(data)
    with pytest.raises(RunFolderError, match="its SHA-256 is not"):
        read_adapter(tmp_path)


def test_atomic_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path):
    atomic_write(tmp_path / "x", b"long old content")
    atomic_write(str(tmp_path / "x"), b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"new")]
