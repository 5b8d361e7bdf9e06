import hashlib
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ubsmoe.storage import checkpoints
from ubsmoe.storage.checkpoints import (
    CheckpointError,
    NewerFormatError,
    file_sha256,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from ubsmoe.storage.tensors import read_facts, read_tensors, tensor_bytes, tensor_parts

FACTS = {"bytes_sent": 12345, "loss": 0.1, "order": ["b", "a"], "generator": {"state": 2**70}}
FILES = ("state.safetensors", "facts.json", "manifest.json", "manifest.sha256")


def some_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.1.up.A": torch.randn(2, 3, 5, generator=generator),
        "layers.0.up.B": torch.randn(2, 7, 3, generator=generator).to(torch.bfloat16),
        "touched": torch.tensor([True, False, True]),
        "tokens": torch.tensor([2**62, -1]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "nan": torch.tensor([float("nan"), float("-inf")]),
    }


def same_bits(first, second):
    def bits(tensors):
        return {name: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()) for name, t in tensors.items()}

    return bits(first) == bits(second)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    save_checkpoint(tmp_path, 3, some_tensors(), FACTS)
    checkpoint = load_newest(tmp_path)
    assert (checkpoint.round, checkpoint.facts, checkpoint.skipped) == (3, FACTS, ())
    assert same_bits(checkpoint.tensors, some_tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["round-00003"]


dtypes = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.int8]
)
names = st.text().filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 3), max_size=3)


@settings(max_examples=60)
@given(tensors=st.dictionaries(names, st.tuples(dtypes, shapes), max_size=5), order=st.randoms())
def test_any_names_dtypes_and_shapes_come_back_and_their_order_does_not_matter(tensors, order):
    made = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    shuffled = list(made.items())
    order.shuffle(shuffled)
    data = tensor_bytes(made, {"rank": 4, "alpha": 8.0})
    assert tensor_bytes(dict(shuffled), {"alpha": 8.0, "rank": 4}) == data
    assert same_bits(read_tensors(data), made)
    assert list(read_tensors(data)) == sorted(made)
    assert read_facts(data) == {"rank": 4, "alpha": 8.0}
    assert read_facts(tensor_bytes(made)) == {}
    assert tensor_bytes(made) == safetensors.torch.save(made)


def test_what_lies_whole_on_the_cpu_is_written_from_where_it_lies():
    fused = torch.arange(24.0).reshape(2, 3, 4)
    _, row, whole = tensor_parts({"whole": fused, "row": fused[1]})
    fused[1, 0, 0] = 99.0
    assert torch.frombuffer(whole, dtype=torch.float32).equal(fused.reshape(-1))
    assert torch.frombuffer(row, dtype=torch.float32).equal(fused[1].reshape(-1))


def test_bytes_are_the_same_in_another_process(tmp_path):
    program = (
        "import sys, torch; from ubsmoe.storage.tensors import tensor_bytes\n"
        "tensors = {n: torch.full((2,), float(ord(n))) for n in 'hgfedcba'}\n"
        "data = tensor_bytes(tensors, {'rank': 4, 'alpha': 8.0, 'x': 1})\n"
        "sys.stdout.buffer.write(data)"
    )
    source = str(Path(checkpoints.__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env={"PYTHONPATH": source})
    here = {n: torch.full((2,), float(ord(n))) for n in "abcdefgh"}
    assert run.stdout == tensor_bytes(here, {"x": 1, "rank": 4, "alpha": 8.0})


def test_views_and_transposed_tensors_are_saved_as_what_they_show():
    base = torch.arange(12.0).reshape(3, 4)
    read = read_tensors(tensor_bytes({"row": base[1], "turned": base.T, "again": base, "same": base}))
    assert same_bits(read, {"row": base[1].clone(), "turned": base.T.contiguous(), "again": base, "same": base})


def test_equal_states_give_equal_files(tmp_path):
    for name in ("one", "two"):
        save_checkpoint(tmp_path / name, 1, some_tensors(), FACTS)
    for file in FILES:
        assert file_sha256(tmp_path / "one/round-00001" / file) == file_sha256(tmp_path / "two/round-00001" / file)


def test_file_sha256_is_the_sha256_of_the_content(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_a_run_without_checkpoints_gives_none(tmp_path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "never made") is None


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [3, 5]), (9, [1, 2, 3, 5])])
def test_only_the_newest_are_kept(tmp_path, keep, left):
    for round in (1, 2, 3, 5):
        save_checkpoint(tmp_path, round, some_tensors(), {"round": round}, keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-{round:05d}" for round in left]
    assert load_newest(tmp_path).facts == {"round": 5}


def test_a_leftover_draft_is_neither_loaded_nor_kept(tmp_path):
    save_checkpoint(tmp_path, 1, some_tensors(), {})
    shutil.copytree(tmp_path / "round-00001", tmp_path / ".draft-00002")
    assert load_newest(tmp_path).round == 1
    save_checkpoint(tmp_path, 3, some_tensors(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00001", "round-00003"]


def test_a_saved_round_is_not_saved_over(tmp_path):
    save_checkpoint(tmp_path, 4, some_tensors(), {"which": "first"})
    for round in (4, 2):
        with pytest.raises(CheckpointError, match="round-00004 is there already"):
            save_checkpoint(tmp_path, round, some_tensors(), {"which": "second"})
    assert load_newest(tmp_path).facts == {"which": "first"}


def test_damaged_rounds_that_are_run_again_give_way_and_do_not_push_out_sound_ones(tmp_path):
    for round in (1, 2, 3):
        save_checkpoint(tmp_path, round, some_tensors(round), {}, keep=3)
    for round in (2, 3):
        flip(tmp_path / f"round-{round:05d}/state.safetensors", 999)
    checkpoint = load_newest(tmp_path)
    assert checkpoint.round == 1
    assert ["round-00003" in checkpoint.skipped[0], "round-00002" in checkpoint.skipped[1]] == [True, True]
    save_checkpoint(tmp_path, 2, some_tensors(2), {"again": True})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00001", "round-00002"]
    assert load_newest(tmp_path).facts == {"again": True}


def test_when_all_are_damaged_the_run_does_not_silently_start_over(tmp_path):
    save_checkpoint(tmp_path, 1, some_tensors(), {})
    (tmp_path / "round-00001/manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* usable.*manifest.json"):
        load_newest(tmp_path)


def rewrite_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    data = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "manifest.sha256").write_bytes(checkpoints._checksum_line(data))


def test_a_newer_format_is_refused_even_beside_an_older_checkpoint(tmp_path):
    for round in (1, 2):
        save_checkpoint(tmp_path, round, some_tensors(), {})
    rewrite_manifest(tmp_path / "round-00002", format=2)
    with pytest.raises(NewerFormatError, match=r"format 2, this ubsmoe reads up to 1; install the newer"):
        load_newest(tmp_path)
    with pytest.raises(CheckpointError, match="there already"):
        save_checkpoint(tmp_path, 2, some_tensors(), {})
    assert (tmp_path / "round-00002").exists()


def test_an_older_format_is_refused(tmp_path):
    rewrite_manifest(save_checkpoint(tmp_path, 1, some_tensors(), {}), format=0)
    with pytest.raises(CheckpointError, match="format 0, which this ubsmoe no longer reads"):
        load_checkpoint(tmp_path / "round-00001")


@pytest.mark.parametrize(
    "changes", [{"files": {}}, {"files": 3}, {"format": "x"}, {"round": None}, {"files": {"facts.json": []}}]
)
def test_a_manifest_made_by_hand_gives_a_typed_error(tmp_path, changes):
    rewrite_manifest(save_checkpoint(tmp_path, 1, some_tensors(), {}), **changes)
    with pytest.raises(CheckpointError, match="malformed"):
        load_checkpoint(tmp_path / "round-00001")


@pytest.mark.parametrize("file", ["state.safetensors", "facts.json"])
@pytest.mark.parametrize("data", [b"", b"\x80\x04K\x01.", b"\xff" * 16, b"[" * 100_000])
def test_foreign_content_with_fitting_hashes_gives_a_typed_error(tmp_path, file, data):
    path = save_checkpoint(tmp_path, 1, some_tensors(), {})
    (path / file).write_bytes(data)
    files = json.loads((path / "manifest.json").read_text())["files"]
    files[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite_manifest(path, files=files)
    with pytest.raises(CheckpointError, match="malformed"):
        load_checkpoint(path)


def test_a_renamed_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path, 1, some_tensors(), {}).rename(tmp_path / "round-00007")
    with pytest.raises(CheckpointError, match="was renamed: it holds round 1"):
        load_checkpoint(tmp_path / "round-00007")


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_is_refused(tmp_path, file):
    path = save_checkpoint(tmp_path, 1, some_tensors(), FACTS)
    whole = (path / file).read_bytes()
    bits = random.Random(0).sample(range(8 * len(whole)), min(250, 8 * len(whole)))
    for bit in bits:
        flip(path / file, bit)
        with pytest.raises(CheckpointError, match=r"damaged"):
            load_checkpoint(path)
        (path / file).write_bytes(whole)
    assert load_checkpoint(path).round == 1


@pytest.mark.parametrize("file", FILES)
def test_every_truncation_and_extension_is_refused(tmp_path, file):
    path = save_checkpoint(tmp_path, 1, some_tensors(), FACTS)
    whole = (path / file).read_bytes()
    cuts = random.Random(0).sample(range(len(whole)), 50)
    for wrong in [whole[:cut] for cut in cuts] + [whole + b"\n", b""]:
        (path / file).write_bytes(wrong)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(tmp_path, file):
    path = save_checkpoint(tmp_path, 1, some_tensors(), FACTS)
    (path / file).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot be read.*{file}"):
        load_checkpoint(path)


@pytest.mark.parametrize("facts", [{"x": {3: "int key"}}, {3: 1}, {"x": (1, 2)}, {"x": {1, 2}}, {"x": torch.ones(1)}])
def test_facts_that_json_would_change_are_refused_before_anything_is_written(tmp_path, facts):
    with pytest.raises(CheckpointError, match="JSON"):
        save_checkpoint(tmp_path / "c", 1, some_tensors(), facts)
    assert not (tmp_path / "c").exists()


def test_the_loss_of_a_run_that_diverged_is_kept(tmp_path):
    save_checkpoint(tmp_path, 1, {}, {"history": [{"loss": float("nan")}, {"loss": float("inf")}]})
    nan, infinite = (entry["loss"] for entry in load_newest(tmp_path).facts["history"])
    assert math.isnan(nan)
    assert infinite == math.inf


def test_the_name_that_safetensors_keeps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="__metadata__"):
        save_checkpoint(tmp_path, 1, {"__metadata__": torch.ones(1)}, {})


@pytest.mark.parametrize(("round", "keep"), [(-1, 2), (1, 0)])
def test_senseless_numbers_are_refused(tmp_path, round, keep):
    with pytest.raises(CheckpointError, match="expected round >= 0 and keep >= 1"):
        save_checkpoint(tmp_path, round, {}, {}, keep)


def test_what_is_loaded_can_be_saved_again_to_the_same_bytes(tmp_path):
    first = save_checkpoint(tmp_path / "a", 1, some_tensors(), FACTS)
    loaded = load_newest(tmp_path / "a")
    second = save_checkpoint(tmp_path / "b", 1, loaded.tensors, loaded.facts)
    assert [(first / file).read_bytes() for file in FILES] == [(second / file).read_bytes() for file in FILES]
