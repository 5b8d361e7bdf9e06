"""Federated fine-tuning of sparse mixture-of-experts language models on unequal machines."""

from typing import TYPE_CHECKING, Any

from ubsmoe.version import __version__ as __version__

if TYPE_CHECKING:
    from ubsmoe.finished.federated_moe import FederatedMoE as FederatedMoE


def __getattr__(name: str) -> Any:
    """`FederatedMoE` on first use: importing torch would make every verb of the command line slow."""
    if name == "FederatedMoE":
        from ubsmoe.finished.federated_moe import FederatedMoE

        return FederatedMoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
