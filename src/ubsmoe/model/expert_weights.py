"""What the kernel multiplies with: a layer's frozen experts in one orientation, and their LoRA."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ubsmoe.model.on_demand import OnDemand
from ubsmoe.model.quantised import format_of, quantised_matrix


@dataclass(frozen=True)
class ExpertWeights:
    """A layer's frozen experts in one orientation.

    `up` and `down` are views, input first, or made when they are read; `pre` is 2 f where a gate stands beside the up
    projection, else f. `activation` is the family's own; `is_swiglu` says that it is the plain silu(gate) * up with gate and up
    side by side, whose gradient the kernel knows.
    """

    up: Float[Tensor, "M h pre"] | OnDemand
    down: Float[Tensor, "M f h"] | OnDemand
    up_bias: Float[Tensor, "M pre"] | None
    down_bias: Float[Tensor, "M h"] | None
    activation: Callable[[Float[Tensor, "n pre"]], Float[Tensor, "n f"]]
    is_swiglu: bool

    @classmethod
    def of(cls, module: nn.Module) -> "ExpertWeights":
        """Read them from a transformers experts module."""
        name = up_name(module)

        def oriented(stored: str) -> Any:
            if format_of(module):
                return quantised_matrix(module, stored)
            weight = getattr(module, stored)
            return weight if module.is_transposed else weight.transpose(1, 2)

        gate = getattr(type(module), "_apply_gate", None)
        return cls(
            up=oriented(name),
            down=oriented("down_proj"),
            up_bias=getattr(module, f"{name}_bias") if module.has_bias else None,
            down_bias=module.down_proj_bias if module.has_bias else None,  # type: ignore[arg-type]
            activation=module._apply_gate if module.has_gate else module.act_fn,  # type: ignore[arg-type]
            # transformers gives every class without a gate of its own this one default
            is_swiglu=bool(module.has_gate)
            and getattr(gate, "__name__", "") == "_default_apply_gate"
            and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"),
        )


def up_name(module: nn.Module) -> str:
    """The name of the first expert matrix: gate and up fused, or up alone."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def matrix_names(module: nn.Module) -> tuple[str, str]:
    """The names of both expert matrices."""
    return up_name(module), "down_proj"


@dataclass(frozen=True)
class Lora:
    """A layer's adapter as the kernel takes it: A and B of both matrices, and the factor s = alpha / r."""

    up_a: Float[Tensor, "M up_rank h"]
    up_b: Float[Tensor, "M pre up_rank"]
    down_a: Float[Tensor, "M down_rank f"]
    down_b: Float[Tensor, "M h down_rank"]
    scale: float

    def detached(self) -> "Lora":
        """The same numbers, receiving no gradient."""
        return Lora(self.up_a.detach(), self.up_b.detach(), self.down_a.detach(), self.down_b.detach(), self.scale)

    @classmethod
    def absent(cls, base: ExpertWeights, like: Float[Tensor, "T h"]) -> "Lora":
        """No adapter: factors of rank 0."""
        (experts, h, pre), (_, f, _) = base.up.shape, base.down.shape
        factors = [
            torch.zeros(experts, *shape, dtype=like.dtype, device=like.device)
            for shape in ((0, h), (pre, 0), (0, f), (h, 0))
        ]
        return cls(factors[0], factors[1], factors[2], factors[3], scale=1.0)
