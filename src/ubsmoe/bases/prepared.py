"""A base stored so that runs map it, as the command line asks for it."""

from pathlib import Path
from typing import Any

from ubsmoe.config import ModelSettings
from ubsmoe.model.load import prepare_base
from ubsmoe.storage.bases import read_facts


def prepare(settings: ModelSettings, out: Path | None) -> tuple[Path, dict[str, Any]]:
    """Where the prepared base lies, and what it says of itself. Arguments and errors are those of `prepare_base`."""
    folder = prepare_base(settings, out)
    return folder, read_facts(folder) or {}
