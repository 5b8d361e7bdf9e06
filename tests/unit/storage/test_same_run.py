"""What a colleague's folder can do to a run: other settings, other data, links, damage. Each is named, and says how to go on."""

import contextlib
import json
import os
import re
import shutil

import pytest
import torch

from ubsmoe.errors import UserError
from ubsmoe.storage.checkpoints import load_newest
from ubsmoe.storage.events import read_events
from ubsmoe.storage.runfolder import RunFolder, RunFolderError, read_adapter, read_run

SETTINGS = {"seed": 3, "method": {"name": "fedavg"}, "train": {"rounds": 5}, "rounds": {"quorum": 0.5}}
CONFIG, VERSIONS = json.dumps(SETTINGS), {"ubsmoe": "9.9.9"}
ORIGIN = {"base": "b0", "tokenizer": "t0", "template": "p0", "data.train": "d0", "data.test": "e0"}
CHECKPOINT_FILES = [f"checkpoints/round-00002/{end}" for end in ("manifest.json", "manifest.sha256", "facts.json")]
DEEP = b"[" * 200_000


def stopped(path, rounds=2):
    """A run folder with checkpoints and events of so many rounds."""
    with RunFolder.open_or_create(path, CONFIG, VERSIONS) as folder:
        folder.resume(ORIGIN)
        for number in range(1, rounds + 1):
            folder.events.append("round", number)
            folder.save_checkpoint(number, {"w": torch.full((3, 5), float(number))}, {"history": []}, keep=2)
    return path


def resumed(path, config=CONFIG, origin=ORIGIN):
    with RunFolder.open_or_create(path, config, VERSIONS) as folder:
        return folder.resume(origin).round


@pytest.mark.parametrize("gone", [["config.json"], ["versions.json"], ["config.json", "versions.json", "events.jsonl"]])
def test_without_its_config_a_folder_takes_the_settings_of_its_checkpoints_and_no_others(tmp_path, gone):
    stopped(tmp_path)
    for name in gone:
        (tmp_path / name).unlink()
    with pytest.raises(RunFolderError, match=r"other settings: .*method\.name \(there 'fedavg', asked 'ubsmoe'\)"):
        resumed(tmp_path, json.dumps(SETTINGS | {"method": {"name": "ubsmoe"}, "seed": 4}))
    assert resumed(tmp_path) == 2
    assert read_run(tmp_path).config == SETTINGS


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path):
    stopped(tmp_path / "own")
    with RunFolder.open_or_create(tmp_path / "other", json.dumps(SETTINGS | {"seed": 8}), VERSIONS) as folder:
        folder.resume(ORIGIN)
        for number in (1, 2, 3):
            folder.save_checkpoint(number, {"w": torch.ones(2)}, {}, keep=1)
    shutil.copytree(tmp_path / "other/checkpoints/round-00003", tmp_path / "own/checkpoints/round-00003")
    with pytest.raises(RunFolderError, match=r"other settings: seed \(there 8, asked 3\)"):
        resumed(tmp_path / "own")


@pytest.mark.parametrize("name", ORIGIN)
def test_a_change_of_what_a_run_is_made_of_is_refused_by_its_name_and_nothing_is_written(tmp_path, name):
    stopped(tmp_path)
    before = (tmp_path / "events.jsonl").read_bytes()
    with pytest.raises(RunFolderError, match=rf"whose {name} changed since its checkpoint of round 2; put back"):
        resumed(tmp_path, origin=ORIGIN | {name: "other"})
    assert (tmp_path / "events.jsonl").read_bytes() == before
    assert resumed(tmp_path) == 2


def test_what_may_change_is_recorded_even_if_the_first_try_was_killed(tmp_path):
    stopped(tmp_path)
    asked = json.dumps(SETTINGS | {"rounds": {"quorum": 0.25}, "train": {"rounds": 9}})
    RunFolder.open_or_create(tmp_path, asked, VERSIONS).close()  # killed before it was resumed
    assert resumed(tmp_path, asked) == 2
    event = read_events(tmp_path / "events.jsonl")[-1]
    assert event["settings_changed"] == {"rounds.quorum": [0.5, 0.25], "train.rounds": [5, 9]}


GROWN = {"clients": {"count": 4}}


@pytest.mark.parametrize(
    ("there", "asked", "sentence"),
    [
        ({}, {"train": {"rounds": 1}}, "has done 2 rounds, train.rounds is 1; set 2 or more"),
        (GROWN, {"clients": {"count": 3}}, "clients.count = 4, asked 3: it can only grow"),
        (GROWN | {"privacy": {"delta": 0.1}}, {"clients": {"count": 5}}, "asked 5: epsilon was reckoned with these"),
        ({"data": {"test": None}}, {"data": {"test": "a.jsonl"}}, "data.test (there None, asked 'a.jsonl')"),
        (
            {"train": {"rounds": 5, "schedule": "cosine"}},
            {"train": {"rounds": 6, "schedule": "cosine"}},
            "whose train.schedule spans its 5 rounds; to have more of them, begin with train.schedule_rounds set",
        ),
    ],
)
def test_what_may_not_change_so_is_refused_with_the_reason(tmp_path, there, asked, sentence):
    with RunFolder.open_or_create(tmp_path, json.dumps(SETTINGS | there), VERSIONS) as folder:
        folder.resume(ORIGIN)
        folder.save_checkpoint(2, {"w": torch.ones(2)}, {}, keep=1)
    with pytest.raises(RunFolderError, match=re.escape(sentence)):
        resumed(tmp_path, json.dumps(SETTINGS | there | asked))
    assert read_run(tmp_path).config == SETTINGS | there


def test_data_that_were_moved_are_told_by_their_hash(tmp_path):
    there = SETTINGS | {"data": {"train": "/old/d.jsonl", "test": "/old/t.jsonl"}, "model": {"base": "/old/base"}}
    moved = SETTINGS | {"data": {"train": "/new/d.jsonl", "test": "/new/t.jsonl"}, "model": {"base": "/new/base"}}
    with RunFolder.open_or_create(tmp_path, json.dumps(there), VERSIONS) as folder:
        folder.resume(ORIGIN)
        folder.save_checkpoint(1, {"w": torch.ones(2)}, {}, keep=1)
    with pytest.raises(RunFolderError, match=r"whose data\.train changed since its checkpoint of round 1"):
        resumed(tmp_path, json.dumps(moved), ORIGIN | {"data.train": "other"})
    assert resumed(tmp_path, json.dumps(moved)) == 1


@pytest.mark.parametrize("kind", ["symbolic", "hard", "pipe"])
@pytest.mark.parametrize("name", [".lock", "events.jsonl"])
def test_a_planted_link_is_refused_and_what_it_names_stays(tmp_path, name, kind):
    folder, victim = stopped(tmp_path / "run"), tmp_path / "victim"
    victim.write_text("precious")
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (os.symlink if kind == "symbolic" else os.link)(victim, folder / name)
    with pytest.raises(RunFolderError, match=rf"{name} is a link.*; remove {name}, or choose another --out"):
        resumed(folder)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "name", [".config.json.draft", "config.json", "summary.json", ".summary.json.draft", "adapter.safetensors"]
)
def test_a_link_in_the_place_of_a_file_that_is_written_anew_is_replaced(tmp_path, name):
    folder, victim = stopped(tmp_path / "run"), tmp_path / "victim"
    victim.write_bytes(CONFIG.encode())
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    with RunFolder.open_or_create(folder, json.dumps(SETTINGS | {"rounds": {"quorum": 0.1}}), VERSIONS) as opened:
        opened.resume(ORIGIN)
        opened.write_adapter({"w": torch.ones(2)})
        opened.write_summary({"seconds": 1.0})
    assert victim.read_bytes() == CONFIG.encode()
    assert not any(path.is_symlink() for path in folder.iterdir() if not path.name.endswith(".draft"))


def test_a_link_in_the_place_of_checkpoints_is_refused_and_one_among_them_is_only_unlinked(tmp_path):
    folder, elsewhere = stopped(tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("precious")
    (folder / "checkpoints" / "round-00000").symlink_to(elsewhere)
    (folder / "checkpoints" / ".draft-00003").symlink_to(elsewhere)
    with RunFolder.open_or_create(folder, CONFIG, VERSIONS) as opened:
        opened.resume(ORIGIN)
        opened.save_checkpoint(3, {"w": torch.ones(2)}, {}, keep=1)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["round-00003"]
    shutil.move(folder / "checkpoints", tmp_path / "moved")
    (folder / "checkpoints").symlink_to(tmp_path / "moved")
    with pytest.raises(RunFolderError, match="checkpoints is a link"):
        resumed(folder)
    assert (elsewhere / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    "damage", [b"{", b"\xff\xfe", DEEP, b"[1]", b"{}"], ids=["torn", "bytes", "deep", "a list", "empty"]
)
def test_damage_in_the_middle_of_the_events_is_told_with_its_line_and_with_a_way_on(tmp_path, damage):
    stopped(tmp_path)
    lines = (tmp_path / "events.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "events.jsonl").write_bytes(lines[0] + damage + b"\n" + b"".join(lines[1:]))
    with pytest.raises(
        UserError, match=r"line 2: not .*Remove that line, or move the file away, and start the run again"
    ):
        read_events(tmp_path / "events.jsonl")
    with pytest.raises(UserError, match=r"events\.jsonl near byte .*move the file away"):
        resumed(tmp_path)
    (tmp_path / "events.jsonl").rename(tmp_path / "events.jsonl.damaged")
    assert resumed(tmp_path) == 2


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", DEEP, b"7"], ids=["torn", "bytes", "deep", "a number"])
@pytest.mark.parametrize("name", ["config.json", "versions.json", "summary.json", "costs.json"])
def test_damaged_json_anywhere_in_a_folder_is_named_and_moving_it_away_is_a_way_on(tmp_path, name, damage):
    stopped(tmp_path)
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(
        RunFolderError, match=rf"{name} is damaged: .*move it away and start the run again with the same --out"
    ):
        read_run(tmp_path)
    (tmp_path / name).rename(tmp_path / f"{name}.damaged")
    assert resumed(tmp_path) == 2
    assert read_run(tmp_path).config == SETTINGS


@pytest.mark.parametrize(
    "header", [DEEP, b'{"__metadata__": 7}', b'{"__metadata__": {"ubsmoe": 7}}', b"[]"], ids=["deep", "7", "8", "list"]
)
def test_a_header_of_an_adapter_that_makes_no_sense_is_a_sentence(tmp_path, header):
    with RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS) as folder:
        folder.write_summary({"seconds": 1.0})
    (tmp_path / "adapter.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(RunFolderError, match=r"adapter\.safetensors is damaged"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
@pytest.mark.parametrize(
    "name", ["config.json", "versions.json", "costs.json", "events.jsonl", "adapter.safetensors", *CHECKPOINT_FILES]
)
def test_a_pipe_in_the_place_of_any_file_is_not_waited_for(tmp_path, name, kind):
    stopped(tmp_path)
    with RunFolder.open_or_create(tmp_path, CONFIG, VERSIONS) as folder:
        folder.write_summary({"seconds": 1.0})
    (tmp_path / name).unlink(missing_ok=True)
    kind(tmp_path / name)
    for read in (read_run, read_adapter, lambda path: load_newest(path / "checkpoints"), resumed):
        with contextlib.suppress(OSError, UserError):  # each a sentence; only that it ends is the matter here
            read(tmp_path)
    if name in CHECKPOINT_FILES:
        assert resumed(tmp_path) == 1
