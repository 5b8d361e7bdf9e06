"""What a method may put on one expert matrix, and how it becomes the one pair of factors that the kernel knows.

Delta W = s B A              a trained pair; or B trained alone
          s B C A            a core C trained between two frozen factors
        + B_side A_side      a frozen side factor of any rank beside either
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def layer_of_experts(name: str) -> int | None:
    """The layer whose experts a tensor of an adapter belongs to; None for what every token uses: routers and attention.

    >>> layer_of_experts("layers.3.up.A"), layer_of_experts("layers.3.router"), layer_of_experts("layers.3.attention.q_proj.A")
    (3, None, None)
    """
    _, layer, matrix, *_ = name.split(".")
    return int(layer) if matrix in ("up", "down") else None


@dataclass(frozen=True)
class MatrixAdapter:
    """The adapter of one matrix of all experts; what is trained among these is an nn.Parameter, the rest is frozen.

    `side` is (A_side, B_side / s), since the kernel multiplies by s. An attention projection, which has no experts, has M = 1.
    """

    a: Float[Tensor, "M r in"]
    b: Float[Tensor, "M out r"]
    core: Float[Tensor, "M r r"] | None = None
    side: tuple[Float[Tensor, "M side in"], Float[Tensor, "M out side"]] | None = None

    def joined(self) -> tuple[Float[Tensor, "M r in"], Float[Tensor, "M out r"]]:
        """A and B of the whole: the core multiplied into B, the side factor put beside both, along the rank.

        To be called in every forward pass, for autograd takes the gradients apart again.
        """
        b = self.b if self.core is None else self.b @ self.core
        if self.side is None:
            return self.a, b
        return torch.cat([self.a, self.side[0]], dim=1), torch.cat([b, self.side[1]], dim=2)
