"""Checkpoints: the state of a run after a round, whole or absent, and never believed without its hashes.

    round-00003/
        state.safetensors   the tensors
        facts.json          everything else: generator states, costs so far, ...
        manifest.json       format, round, size and SHA-256 of the two above
        manifest.sha256     SHA-256 of manifest.json, in the format of the sha256sum tool

A checkpoint is written into a draft folder, made durable, and then renamed, which is the moment it exists. Reading goes
the other way: manifest.sha256 vouches for the manifest, the manifest for the two files; only then is anything parsed.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ubsmoe.errors import UserError
from ubsmoe.storage import disk
from ubsmoe.storage.disk import file_sha256 as file_sha256
from ubsmoe.storage.json_text import encode_json
from ubsmoe.storage.tensors import read_tensors, tensor_parts

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
STATE, FACTS, MANIFEST, SEAL = "state.safetensors", "facts.json", "manifest.json", "manifest.sha256"
DRAFT = ".draft-"


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used; the message says which, why, and what to do."""


class NewerFormatError(CheckpointError):
    """A sound checkpoint, written by a newer ubsmoe."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after `round`; `skipped` says, one sentence each, which newer checkpoints were unusable and why."""

    round: int
    tensors: dict[str, "Tensor"]
    facts: dict[str, Any]
    skipped: tuple[str, ...] = ()


def save_checkpoint(
    folder: str | Path,
    round: int,
    tensors: Mapping[str, "Tensor"],
    facts: Mapping[str, Any],
    keep: int = 2,
    spared: Collection[int] = (),
) -> Path:
    """Write the checkpoint of a round; it is durable when this returns.

    Equal tensors and facts give equal bytes. Older checkpoints go only once this one is durable.

    Args:
        folder: where a run's checkpoints live; created when missing. One writer at a time.
        round: the round that has just ended.
        tensors: by name, as for `tensor_parts`; they are written from where they lie.
        facts: what JSON gives back as it was: text keys, lists rather than tuples.
        keep: how many checkpoints stay, this one included.
        spared: rounds whose checkpoints stay beside these.

    Returns:
        The checkpoint's own folder.

    Raises:
        CheckpointError: if the disk is full or failing, if facts are not JSON, or if this round or a later one is saved
            already. The checkpoints that were there are intact.
    """
    if round < 0 or keep < 1:
        raise CheckpointError(f"expected round >= 0 and keep >= 1, got round {round} and keep {keep}")
    folder = Path(folder)
    files = _seal(round, {STATE: tensor_parts(tensors), FACTS: _fact_bytes(facts)})
    try:
        _clear_the_way(folder, round)
        target = _write(folder, round, files)
    except OSError as error:
        raise CheckpointError(
            f"cannot save round {round} in {folder}: {error}. The checkpoints already there are intact; "
            "free some space or mend the disk, then start the run again to resume"
        ) from error
    _prune(folder, keep, spared)
    return target


def load_newest(folder: str | Path, most: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that passes every check, or None if there never was one.

    Args:
        folder: where they are.
        most: how many are looked at; all when left out.

    Raises:
        CheckpointError: if there are checkpoints and none is usable.
        NewerFormatError: if a newer ubsmoe wrote the newest; an older one is not taken in its place.
    """
    skipped: list[str] = []
    for _, path in reversed(_saved(Path(folder))[-most if most else None :]):
        try:
            return replace(load_checkpoint(path), skipped=tuple(skipped))
        except NewerFormatError:
            raise
        except CheckpointError as error:
            skipped.append(str(error))
    if skipped:
        raise CheckpointError(
            f"no checkpoint in {folder} is usable; start anew with another --out: {'; '.join(skipped)}"
        )
    return None


def saved_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, for `load_checkpoint`."""
    return [path for _, path in _saved(Path(folder))]


def newest_round(folder: str | Path) -> int | None:
    """The round of the newest checkpoint in a folder, None if there is none; its contents are not looked at."""
    return max((number for number, _ in _saved(Path(folder))), default=None)


def load_round(folder: str | Path, round: int) -> Checkpoint:
    """The checkpoint of one round. Raises CheckpointError as `load_checkpoint`."""
    return load_checkpoint(Path(folder) / _name(round))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        CheckpointError: if anything in it is missing, damaged or of another format; the message says what.
    """
    path = Path(path)
    try:
        manifest = _read_manifest(path)
        state, facts = (_read_verified(path / name, manifest["files"][name]) for name in (STATE, FACTS))
        return Checkpoint(manifest["round"], read_tensors(state), json.loads(facts))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        # The hashes fit, so this was not the disk: someone made these files by hand.
        raise CheckpointError(f"{path} is malformed: {error!r}") from error


def _fact_bytes(facts: Mapping[str, Any]) -> bytes:
    """Facts as JSON, refused unless they come back equal: a key 3 that returns as "3" would break a resumed run."""
    try:
        data = json.dumps(dict(facts), sort_keys=True, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the facts of a checkpoint must be plain JSON: {error}") from None
    if not _same(dict(facts), json.loads(data)):
        raise CheckpointError("facts would change in JSON; use text keys, and lists instead of tuples")
    return data


def _same(value: Any, back: Any) -> bool:
    """Equality for which NaN equals NaN: the loss of a run that diverged is a fact too."""
    if isinstance(value, dict) and isinstance(back, dict):
        return value.keys() == back.keys() and all(_same(value[key], back[key]) for key in value)
    if isinstance(value, list) and isinstance(back, list):
        return len(value) == len(back) and all(map(_same, value, back))
    return bool(value == back) or (value != value and back != back)


def _seal(round: int, contents: dict[str, disk.Data]) -> dict[str, disk.Data]:
    """The files of a checkpoint: its contents, the manifest over them, the checksum over the manifest."""
    files = {
        name: {"bytes": sum(map(len, disk.pieces(data))), "sha256": _sha256(data)} for name, data in contents.items()
    }
    manifest = encode_json({"format": FORMAT, "round": round, "files": files}, indent=1)
    return {**contents, MANIFEST: manifest, SEAL: _checksum_line(manifest)}


def _clear_the_way(folder: Path, round: int) -> None:
    """Remove drafts of saves that never ended, and damaged checkpoints of the rounds that are being run again."""
    disk.make_folder(folder)
    for draft in folder.glob(DRAFT + "*"):
        disk.remove_folder(draft)
    for number, path in _saved(folder):
        if number >= round:
            if _is_usable(path):
                raise CheckpointError(f"cannot save round {round}: {path} is there already; resume from it instead")
            disk.remove_folder(path)


def _is_usable(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except NewerFormatError:
        return True  # by the ubsmoe that wrote it
    except CheckpointError:
        return False
    return True


def _write(folder: Path, round: int, files: Mapping[str, disk.Data]) -> Path:
    target, draft = folder / _name(round), folder / f"{DRAFT}{round:05d}"
    try:
        disk.make_folder(draft)
        for name, data in files.items():
            disk.write_new_file(draft / name, data)
        disk.sync_folder(draft)
        disk.rename(draft, target)
    except OSError:
        with contextlib.suppress(OSError):  # a full disk gets its space back; if that fails, the next save sweeps
            disk.remove_folder(draft)
        raise
    disk.sync_folder(folder)
    return target


def _prune(folder: Path, keep: int, spared: Collection[int]) -> None:
    for number, path in _saved(folder)[:-keep]:
        if number in spared:
            continue
        try:
            disk.remove_folder(path)
        except OSError as error:
            raise CheckpointError(f"the new checkpoint is safe, but that of round {number} stays: {error}") from error


def _name(round: int) -> str:
    return f"round-{round:05d}"


def _saved(folder: Path) -> list[tuple[int, Path]]:
    """Round and path of what looks like a checkpoint, oldest first."""
    named = ((re.fullmatch(r"round-(\d{5,})", path.name), path) for path in folder.glob("round-*"))
    return sorted((int(match[1]), path) for match, path in named if match)


def _read_manifest(path: Path) -> dict[str, Any]:
    data = disk.read_file(path / MANIFEST)
    if disk.read_file(path / SEAL) != _checksum_line(data):
        raise CheckpointError(f"{path} is damaged: {MANIFEST} and {SEAL} do not agree")
    manifest: dict[str, Any] = json.loads(data)
    if manifest["format"] > FORMAT:
        raise NewerFormatError(
            f"{path} has format {manifest['format']}, this ubsmoe reads up to {FORMAT}; "
            "install the newer ubsmoe that wrote it"
        )
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {manifest['format']}, which this ubsmoe no longer reads ({FORMAT})")
    if path.name != _name(manifest["round"]):
        raise CheckpointError(f"{path} was renamed: it holds round {manifest['round']}")
    return manifest


def _read_verified(path: Path, expected: dict[str, Any]) -> bytes:
    """The bytes that were hashed are the bytes that get parsed: the file is read once."""
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"{path} is damaged: it has {size} bytes, the manifest says {expected['bytes']}")
    data = disk.read_file(path)
    if _sha256(data) != expected["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's")
    return data


def _sha256(data: disk.Data) -> str:
    digest = hashlib.sha256()
    for piece in disk.pieces(data):
        digest.update(piece)
    return digest.hexdigest()


def _checksum_line(manifest: bytes) -> bytes:
    return f"{_sha256(manifest)}  {MANIFEST}\n".encode()
