"""Fed-SB: only a small square core between two fixed factors is trained and sent.

    Delta W = s B R A,    B [out, r] and A [r, in] fixed, R [r, r] trained,    R <- sum_c p_c R_c,    p_c = n_c / sum n

The mean of cores is the mean of updates, exactly, since B and A are shared; r^2 numbers travel per matrix, however
large it is.

Reconstructed: the paper takes B, A and the first R from the SVD of a first gradient on pooled training data, which a
federation does not have. Here B has orthonormal columns and A orthonormal rows in random directions, one draw per
layer and matrix from the run's seed, so that neither ever travels, and R starts at zero, so that the base starts as
it is. The paper's basis knows the data; this one needs a larger rank for the same reach. s = alpha / r as for every
adapter here; the paper has s = 1.

Ranks are uniform, so a tier's budget sets its experts per token; with all budgets at 1 this is the published
aggregation. An expert that a client did not activate comes back as it was sent and counts with full weight; one that
nobody activated stays, weight decay apart.

Source: Fed-SB (Singhal et al. 2025, arXiv 2502.15436).
"""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ubsmoe.costs.traffic import adapter_traffic
from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.factors import check_independent, routers
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Hooks, Method, RunShape, State, adapter_part
from ubsmoe.methods.refusals import OWN_WEIGHTS
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for


def fed_sb(shape: RunShape) -> Method:
    """Build the method; it has no settings."""

    def start(adapter: dict[str, Tensor]) -> State:
        check_independent(adapter, "fed_sb")
        cores = {
            f"{name[:-2]}.R": torch.zeros(len(value), shape.rank, shape.rank)
            for name, value in adapter.items()
            if name.endswith(".A")
        }
        return State(cores | routers(adapter))

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        fixed = basis(model, shape)
        model.load_adapter({**fixed, **adapter_part(payload)}, shape.alpha, frozen=fixed)
        model.set_top_k(profile.top_k)
        return Hooks()

    return replace(
        fedavg(shape),
        name="fed_sb",
        start=start,
        install=install,
        refuses=OWN_WEIGHTS,
        traffic=partial(adapter_traffic, down="R", up="R"),
    )


def basis(model: SparseModel, shape: RunShape) -> dict[str, Tensor]:
    """The fixed factors of every matrix, the same for all experts of a layer."""
    tensors = {}
    for layer in model.layers:
        for name, (experts, out_features, in_features) in layer.matrices(shape.attention).items():
            key = f"layers.{layer.index}.{name}"
            generator = generator_for(shape.seed, "basis", key)
            b, a = (orthonormal(size, shape.rank, generator) for size in (out_features, in_features))
            tensors[f"{key}.A"] = a.T.expand(experts, -1, -1)
            tensors[f"{key}.B"] = b.expand(experts, -1, -1)
    return tensors


def orthonormal(size: int, rank: int, generator: torch.Generator) -> Float[Tensor, "size rank"]:
    """Random orthonormal columns. QR leaves their signs to the library; here the diagonal of its R is positive."""
    q, r = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))
    columns: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return columns.float()
