"""Federated fine-tuning of sparse mixture-of-experts language models on unequal machines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ubsmoe.version import __version__ as __version__

if TYPE_CHECKING:
    from ubsmoe.finished.federated_moe import FederatedMoE as FederatedMoE
    from ubsmoe.training.federation import Federation as Federation

__all__ = ["FederatedMoE", "Federation", "__version__"]

_PLACES = {"FederatedMoE": "ubsmoe.finished.federated_moe", "Federation": "ubsmoe.training.federation"}


def __getattr__(name: str) -> Any:
    """`Federation` and `FederatedMoE` on first use: importing torch would make every verb of the command line slow."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
