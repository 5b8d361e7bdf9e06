"""Records beside a run, and whole run folders copied."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from ubsmoe.storage import disk
from ubsmoe.storage.exportfolder import write_folder
from ubsmoe.storage.layout import CONFIG, LOCK, RECORDS, read_json
from ubsmoe.storage.runfolder import refuse_foreign
from ubsmoe.storage.same_run import RunFolderError


def place_files(folder: Path, files: Mapping[Path, bytes]) -> None:
    """Put the records of a run into its folder; the same ones may be there already.

    Raises:
        RunFolderError: if others are, or the folder holds something else than a run.
    """
    if not files:
        return
    refuse_foreign(folder)
    for path, data in files.items():
        if path.exists() and disk.read_file(path) != data:
            raise RunFolderError(f"{path} holds other records; choose another out, or give the same ones to go on")
    for path, data in files.items():
        disk.make_folder(path.parent)
        disk.atomic_write(path, data)


def copy_run(folder: Path, target: Path) -> None:
    """Copy a run folder; the copy appears whole or not at all, and its records are its own.

    Raises:
        ExportError: if there is something at `target`, or the disk refuses.
    """

    def fill(draft: Path) -> None:
        skipped = shutil.ignore_patterns(LOCK, "*.draft", ".draft-*")
        shutil.copytree(folder, draft, ignore=skipped, dirs_exist_ok=True)
        config = read_json(draft / CONFIG)
        for key in ("train", "test"):
            if (draft / RECORDS / f"{key}.jsonl").exists():
                config["data"][key] = str(target.absolute() / RECORDS / f"{key}.jsonl")
        disk.atomic_write(draft / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())

    write_folder(target, fill)
