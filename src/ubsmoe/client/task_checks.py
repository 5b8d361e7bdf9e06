"""A machine trains on what a server sends only if it is what this run's method sends: finite, in range, of this base's form."""

from dataclasses import replace

import torch

from ubsmoe.client.train import ClientFailure
from ubsmoe.errors import UserError, printable
from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.method import Hooks, Method
from ubsmoe.model.surgery import SparseModel

REFUSED = "the server's task is refused: "
WHOSE = "; the server has other settings than this machine, or is not honest"


def checking_tasks(method: Method) -> Method:
    """The method, whose `install` raises ClientFailure in one sentence for a payload that no honest server sends."""

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        if fault := fault_of(payload, method):
            raise ClientFailure(f"{REFUSED}{fault}{WHOSE}")
        try:
            return method.install(model, payload, profile, generator)
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # names, shapes and numbers are the server's; whatever they break is told to it
            why = printable(str(error)) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
            raise ClientFailure(f"{REFUSED}{printable(why)}{WHOSE}") from error

    return replace(method, install=install)


def fault_of(payload: Tensors, method: Method) -> str | None:
    """What is wrong with a payload's values; None if nothing is."""
    for name, value in payload.items():
        # squares of float32 cannot overflow float64, so the norm is finite just when every entry is
        if value.is_floating_point() and not torch.linalg.vector_norm(value, dtype=torch.float64).isfinite():
            return f"{name} holds NaN or infinity, expected finite numbers"
    return method.out_of_range(payload)
