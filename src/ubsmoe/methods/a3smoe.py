"""A3SMoE-style, reconstructed: budgeted sparse mixture of experts, each expert averaged by who used it.

    theta_i <- sum_c g_{c,i} theta_{c,i} / sum_c g_{c,i},   g_{c,i} = (a_{c,i} / tokens_c) n_c

a_{c,i} counts the tokens that client c routed to expert i. Clients activate K_c = max(1, floor(K_max beta_c)) experts
at one LoRA rank. Neither the imbalance of the experts nor the missing gradients are treated. An expert nobody used
stays bit for bit; a client that never used an expert has no say in it.

The text of A3SMoE was not available to us. Known: budget-dependent numbers of active experts and activation-aware
averaging; its authors overlap with FLAME's, so the weights are FLAME's with exponent 1 and without the output scale.
Numbers from this file are those of an A3SMoE-style method.

Source: A3SMoE (Tran, Le, Pham; MCDC workshop at ICLR 2025); the weights: FLAME (arXiv 2506.16600).
"""

from dataclasses import replace

from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Method, RunShape, by_use
from ubsmoe.methods.refusals import OWN_WEIGHTS, USE_WEIGHS


def a3smoe(shape: RunShape) -> Method:
    """Build the method; it has no settings."""
    method = fedavg(replace(shape, weigh=by_use(exponent=1.0)))
    return replace(method, name="a3smoe", refuses={**USE_WEIGHS, **OWN_WEIGHTS})
