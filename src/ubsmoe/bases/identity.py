"""Which base a folder or a hub id holds: the SHA-256 of its weights."""

from ubsmoe.config import ModelSettings
from ubsmoe.model.load import load_base, weights_sha256


def base_sha256(settings: ModelSettings) -> str:
    """The hash that `model.sha256` expects. Raises UserError as `load_base` does."""
    model, _ = load_base(settings)
    return weights_sha256(model.model)
