"""A folder that holds an exported model or adapter: it appears complete or not at all, and can prove that it is whole.

ubsmoe.json   the sidecar, written last: the facts that the other files cannot hold, and the SHA-256 of every other file
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ubsmoe.errors import UserError
from ubsmoe.storage import disk, tensors
from ubsmoe.storage.json_text import encode_json

if TYPE_CHECKING:
    from torch import Tensor

SIDECAR = "ubsmoe.json"


class ExportError(UserError):
    """A folder that cannot become, or is not, a whole export; the message says why."""


def write_export(path: str | Path, facts: Mapping[str, Any], fill: Callable[[Path], None]) -> None:
    """Let `fill` write the files of an export, add the sidecar, and only then give the folder its name.

    Args:
        path: a folder that does not exist yet, or is empty.
        facts: what the sidecar says beside the hashes.
        fill: writes files into the folder it is given.

    Raises:
        ExportError: if there is something at `path`, or the disk refuses.
    """

    def fill_and_sign(draft: Path) -> None:
        fill(draft)
        hashes = {file.name: disk.file_sha256(file) for file in sorted(draft.iterdir())}
        disk.atomic_write(draft / SIDECAR, encode_json({**facts, "files": hashes}, indent=2))

    write_folder(path, fill_and_sign)


def write_folder(path: str | Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a draft beside `path`, which then takes its name. Raises ExportError as `write_export` does."""
    path = Path(path)
    check_free(path)
    draft = path.with_name(f".{path.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        disk.make_folder(draft)
        fill(draft)
        disk.rename(draft, path)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error}; choose another --out") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_free(path: str | Path) -> None:
    """Raise ExportError if there is something at `path` already."""
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ExportError(f"{path} exists already; choose another --out or remove it")


def write_tensors(path: Path, named: Mapping[str, "Tensor"], **said: str) -> None:
    """A safetensors file of an export, with the header that PyTorch programs look for, and what else it is to say."""
    disk.write_new_file(path, tensors.tensor_parts(named, None, format="pt", **said))


def put_text(path: Path, text: str) -> None:
    """A text file of an export."""
    disk.write_new_file(path, text.encode())


def is_export(path: str | Path) -> bool:
    """Whether a folder says of itself that it is an export."""
    return (Path(path) / SIDECAR).is_file()


def read_export(path: str | Path) -> dict[str, Any]:
    """The facts of an export, once every file has been compared with its hash.

    Raises:
        ExportError: if the folder is no export, lacks a file, or a file is not the one that was written.
    """
    path = Path(path)
    try:
        facts = json.loads(disk.read_file(path / SIDECAR))
        hashes = dict(facts.pop("files"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExportError(f"{path} is not a whole export: {SIDECAR} cannot be used ({error!r}); export again") from None
    for name, expected in hashes.items():
        if not (path / name).is_file():
            raise ExportError(f"{path} is half an export: {name} is missing; copy the whole folder, or export again")
        if disk.file_sha256(path / name) != expected:
            raise ExportError(f"{path / name} is damaged: its SHA-256 is not the one in {SIDECAR}; export again")
    return dict(facts)


def read_export_tensors(path: str | Path) -> dict[str, "Tensor"]:
    """The tensors of one file of an export or a PEFT adapter. Raises ExportError if it cannot be read."""
    try:
        return tensors.read_tensors(disk.read_file(path))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None


def read_export_header(path: str | Path) -> dict[str, str]:
    """What the header of such a file says beside its tensors. Raises ExportError if it cannot be read."""
    try:
        return tensors.read_said(disk.read_file(path))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None


def read_export_json(path: str | Path) -> dict[str, Any]:
    """One JSON object of an export or a PEFT adapter. Raises ExportError if it cannot be read."""
    try:
        return dict(json.loads(disk.read_file(path)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None
