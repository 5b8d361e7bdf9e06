"""Records beside a run, and whole run folders copied."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ubsmoe.storage import disk
from ubsmoe.storage.exportfolder import write_folder
from ubsmoe.storage.layout import CONFIG, LOCK, RECORDS, read_json, refuse_foreign
from ubsmoe.storage.same_run import RunFolderError


@contextmanager
def placed_files(folder: Path, files: Mapping[Path, bytes]) -> Iterator[None]:
    """Put the records of a run into its folder; the same ones may be there already.

    Those that were not are taken back if what is done inside fails: a start that is refused may be made again with others.

    Raises:
        RunFolderError: if others are there, or the folder holds something else than a run.
    """
    if files:
        refuse_foreign(folder)
    new = [path for path in files if not path.exists()]
    for path, data in files.items():
        if path not in new and disk.read_file(path) != data:
            raise RunFolderError(f"{path} holds other records; choose another out, or give the same ones to go on")
    try:
        for path in new:
            disk.make_folder(path.parent)
            disk.atomic_write(path, files[path])
        yield
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise


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
