"""FLoRIST: as FLoRA, but only the strongest directions of the stacked sum are folded into the base.

    S = sum_c p_c s_c B_c A_c = U Sigma V^T,    p = min { c : sum_{i<=c} sigma_i^2 >= tau sum_i sigma_i^2 }
    W <- W + (U_{:p} Sigma_p) V^T_{:p}

p is found per expert and matrix; the tensors of a layer's experts are fused, so all are as wide as the widest of
them, with zeros past each one's own p. The rule is free of scale: an expert that few tokens trained, with a flat
spectrum, keeps a high p. Nothing caps p at a client's own rank. What the cut leaves out is lost: it is not carried to
the next round.

Ours: the side factor and everything else that flora.py says of FLoRA's life cycle; the sum's singular values come
from one R x R core (maths/spectra.py) rather than from the SVDs of both stacks, the same numbers for less.

Source: FLoRIST (Ramesh & Dass 2025, arXiv 2506.09199); tau = 0.9 is its default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from ubsmoe.maths.lora import LoraPair, truncate_rank
from ubsmoe.maths.spectra import energy_rank, truncated_svd
from ubsmoe.methods.flora import folding
from ubsmoe.methods.method import Method, RunShape
from ubsmoe.methods.side import SIDE_GROWS

CUT = "directions that hold the rest of the update's energy are dropped, unless energy = 1"
EXEMPT: Mapping[str, str] = {"predicted_bytes": SIDE_GROWS, "lone_client": CUT, "identical_clients": CUT}


def florist(shape: RunShape, *, energy: Annotated[float, Field(gt=0, le=1)] = 0.9) -> Method:
    """Build the method.

    Args:
        shape: sizes of the run.
        energy: tau, the share of the squared singular values that is kept.
    """

    def strongest(pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
        whole = truncated_svd(pairs, weights)
        return truncate_rank(whole.pair, energy_rank(whole.singular_values, energy))

    method = folding("florist", shape, strongest)
    return method if energy == 1 else replace(method, exempt=EXEMPT)
