"""Which base a folder or a hub id holds: the SHA-256 of its weights."""

from pathlib import Path

from ubsmoe.config import ConfigError, ModelSettings
from ubsmoe.model.identity import weights_sha256
from ubsmoe.model.load import load_base
from ubsmoe.storage.bases import read_facts, stored_sha256


def base_sha256(settings: ModelSettings, check: bool = False) -> str:
    """The hash that `model.sha256` expects.

    Args:
        settings: [model].
        check: read every weight again, whatever is known of files of these paths, sizes and times.

    Raises:
        UserError: as `load_base` does; or if the weights are not those that are known of these files.
    """
    plain = settings.model_copy(update={"experts": None})
    model, _ = load_base(plain)
    if check:
        facts = read_facts(Path(settings.base)) or {}
        if facts.get("experts"):
            found, known = stored_sha256(Path(settings.base)), facts["stored_sha256"]
        else:
            found, known = weights_sha256(model.model), model.sha256
        if found != known:
            raise ConfigError(
                f"model.base: the weights of {settings.base} have changed under the same size and time: SHA-256 {found} instead of "
                f"{known}; fetch or prepare the base again, and touch its files"
            )
    return model.sha256
