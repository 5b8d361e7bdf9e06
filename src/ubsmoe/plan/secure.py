"""What secure aggregation adds to a round: bytes, and seconds of this machine for a client's masks."""

import time
from typing import Any

import torch

from ubsmoe.plan.tiers import TierPlan


def secure_costs(plan: TierPlan) -> dict[str, Any]:
    """`secure_aggregation` of a plan, measured on a mask of 16 MB; nothing where there is none."""
    if plan.secure is None:
        return {}
    from ubsmoe.secagg.masks import add_mask  # needs the extra secagg, which other plans need not

    vector = torch.zeros(1 << 22, dtype=torch.int32)
    began = time.perf_counter()
    add_mask(vector, bytes(32), 1)
    seconds = (time.perf_counter() - began) * plan.secure.vector_bytes / vector.nbytes
    own = plan.secure
    words = (
        f"secure aggregation, per client and round: {own.vector_bytes / 1e6:,.1f} MB of masked integers up, "
        f"{(own.key_upload_bytes + own.key_download_bytes) / 1e3:,.1f} kB of keys and shares, "
        f"{own.masks * seconds:.3g} s for {own.masks} masks"
    )
    return {"secure_aggregation": {**own.as_dict(), "mask_seconds": own.masks * seconds, "in_words": words}}
